"""Weights that are damaged or another model's are refused, with tensor and file named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.linear import Linear
from engine.weights import WeightFormats, load_weights
from segue.errors import ModelFileError
from segue.models.config import ModelConfig

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model_dir(checkpoint, tmp_path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen3").directory, tmp_path / "model"))


def load(model_dir: Path, **changes: Any) -> object:
    return load_weights(model_dir, dataclasses.replace(ModelConfig.from_dir(model_dir), **changes), WeightFormats())


def rewrite(model_dir: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(model_dir / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, model_dir / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({DOWN: None}, f"tensor {DOWN} is missing"),
        ({DOWN: torch.zeros(48, 79)}, rf"{DOWN} has shape \[48, 79\], but config.json asks for \[48, 80\]"),
        ({DOWN: torch.zeros(48, 80, dtype=torch.int8)}, f"{DOWN} holds torch.int8"),
        ({"lm_head.weight": None}, "tensor lm_head.weight is missing"),
        ({"model.layers.3.mlp.up_proj.weight": torch.zeros(1)}, "1 tensors that .* does not have: model.layers.3.mlp.up_proj"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(72)}, "does not have: model.layers.0.self_attn.q_proj.bias"),
        ({"model.layers.0.self_attn.q_norm.weight": None}, "q_norm.weight is missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes, problem, model_dir):
    load(model_dir)
    rewrite(model_dir, changes)
    with pytest.raises(ModelFileError, match=problem) as raised:
        load(model_dir)
    assert "model.safetensors" in raised.value.message


def test_left_over_tensors_of_other_exporters_are_let_be(model_dir):
    rewrite(model_dir, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)})
    load(model_dir)
    load(model_dir, tie_embeddings=True)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"\xff" * 100, lambda data: b""])
def test_a_damaged_file_is_named(damage, model_dir):
    file = model_dir / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelFileError, match=r"model.safetensors is damaged or incomplete"):
        load(model_dir)


def test_a_missing_file_is_named(model_dir):
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"cannot read .*model.safetensors"):
        load(model_dir)


def shard(model_dir: Path) -> dict[str, str]:
    """Splits the model over two files; the map from tensor to file."""
    tensors = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    weight_map = {name: f"part-{position % 2}.safetensors" for position, name in enumerate(sorted(tensors))}
    for part in set(weight_map.values()):
        save_file({name: tensor for name, tensor in tensors.items() if weight_map[name] == part}, model_dir / part)
    return weight_map


def write_index(model_dir: Path, weight_map: object) -> None:
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded_weights_are_the_same_weights(model_dir):
    whole = load(model_dir)
    write_index(model_dir, shard(model_dir))
    parts = load(model_dir)
    for name in ("embedding", "head", "final_norm"):
        assert torch.equal(_values(whole, name), _values(parts, name))
    for layer, other in zip(whole.layers, parts.layers, strict=True):
        for name in ("qkv", "qk_norm", "attention_output", "gate_up", "down", "input_norm", "mlp_norm"):
            assert torch.equal(_values(layer, name), _values(other, name))


def _values(weights: object, name: str) -> torch.Tensor:
    found = getattr(weights, name)
    return found.weight.values if isinstance(found, Linear) else found


def test_a_bad_index_is_named(model_dir):
    weight_map = shard(model_dir)
    for bad in ("../part-0.safetensors", "/etc/part.safetensors", "hosts", "..", "", 7, None):
        write_index(model_dir, weight_map | {DOWN: bad})
        with pytest.raises(ModelFileError, match=r"index.json: weight_map: .* is not the name of a .safetensors file"):
            load(model_dir)
    write_index(model_dir, {})
    with pytest.raises(ModelFileError, match=r"index.json: weight_map: is empty"):
        load(model_dir)
    write_index(model_dir, weight_map)
    (model_dir / "part-1.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"cannot read .*part-1.safetensors"):
        load(model_dir)
