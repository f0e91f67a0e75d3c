"""Smoothing vectors: measured as transformers would measure them, kept beside stored models, refused when unsound."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from deploy.calibrated import ensure_ready
from deploy.cli.models import app
from engine import calibration
from engine.calibration import (
    calibrate,
    calibration_tokens,
    ensure_calibrated,
    load_calibration,
    save_calibration,
    smoothing_vector,
)
from segue.config import EngineSettings
from segue.errors import ModelFileError
from segue.models.gguf_import import import_gguf
from segue.models.model_dir import CALIBRATION_NAME, check_model_dir, model_revision
from segue.models.store import resolve
from tests.support.gguf_files import TinyGguf
from tests.unit.engine.conftest import Checkpoint, MakeCheckpoint

# The module of each linear layer that receives what ours of that name receives, and all whose weights ours joins.
MODULES = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "attention_output": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "down": ("mlp", ("down_proj",)),
}


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The store."""
    monkeypatch.setenv("SEGUE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A directory that is not in the store."""
    import_gguf(TinyGguf("llama").write(tmp_path / "tiny.gguf"), tmp_path / "tiny")
    return tmp_path / "tiny"


def unseen(_message: str, _share: float) -> None:
    return


def by_transformers(model: Checkpoint, tokens: list[int]) -> dict[str, torch.Tensor]:
    """sqrt(rms(inputs) / rms(weights)) of each layer, from hooks on its modules."""
    linears = {"head": [model.model.lm_head]}
    for index, layer in enumerate(model.model.model.layers):
        for name, (parent, children) in MODULES.items():
            linears[f"layers.{index}.{name}"] = [getattr(getattr(layer, parent), child) for child in children]
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        modules[0].register_forward_pre_hook(lambda _module, args, name=name: inputs.__setitem__(name, args[0][0].double()))
        for name, modules in linears.items()
    ]
    with torch.inference_mode():
        model.model(torch.tensor([tokens]))
    for hook in hooks:
        hook.remove()
    vectors = {}
    for name, modules in linears.items():
        weights = torch.cat([module.weight.detach().double() for module in modules])
        vector = (inputs[name].square().mean(0).sqrt() / weights.square().mean(0).sqrt()).sqrt()
        vectors[name] = (vector / vector.log().mean().exp()).float()
    return vectors


@pytest.mark.parametrize("name", ["llama", "llama_biases", "qwen2", "qwen3_biases"])
def test_vectors_are_those_measured_in_transformers(checkpoint: MakeCheckpoint, name: str) -> None:
    model = checkpoint(name)
    # More than one step.
    tokens = torch.randint(0, 96, (300,), generator=torch.Generator().manual_seed(2)).tolist()
    shares: list[float] = []
    found = calibrate(model.directory, tokens, shares.append)
    expected = by_transformers(model, tokens)
    assert found.keys() == expected.keys()
    for layer, vector in expected.items():
        torch.testing.assert_close(found[layer], vector, atol=1e-4, rtol=1e-3)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_no_more_than_the_context_is_computed(checkpoint: MakeCheckpoint) -> None:
    model = checkpoint("mistral_window")
    tokens = [number % 96 for number in range(100)]
    assert model.config.max_context == 64
    all_of_it, first_64 = calibrate(model.directory, tokens), calibrate(model.directory, tokens[:64])
    assert all(torch.equal(all_of_it[name], first_64[name]) for name in first_64)


def test_channels_that_are_never_used_are_scaled_by_finite_factors() -> None:
    squares = torch.tensor([0.0, 1.0, 1e30])
    for vector in (smoothing_vector(squares, torch.zeros(3)), smoothing_vector(torch.ones(3), squares)):
        assert (vector.isfinite() & (vector > 0)).all()
    assert torch.equal(smoothing_vector(torch.zeros(3), torch.zeros(3)), torch.ones(3))


def test_a_stored_model_has_its_vectors_beside_it_and_stays_the_same_model(models: Path, tiny: Path) -> None:
    stored = models / "mine"
    shutil.copytree(tiny, stored)
    revision = model_revision(stored)
    ensure_calibrated(stored, unseen)
    assert (stored / CALIBRATION_NAME).exists()
    assert model_revision(stored) == revision
    check_model_dir(stored)
    vectors = load_calibration(stored)
    assert vectors.keys() == {f"layers.{index}.{name}" for index in range(2) for name in MODULES} | {"head"}
    assert vectors["layers.1.down"].shape == (96,)
    # Nothing else was left behind.
    assert {file.name for file in stored.iterdir()} == {file.name for file in tiny.iterdir()} | {CALIBRATION_NAME}


def test_a_directory_of_somebody_else_is_only_read(models: Path, tiny: Path) -> None:
    before = sorted(tiny.iterdir())
    ensure_calibrated(tiny, unseen)
    assert sorted(tiny.iterdir()) == before
    assert [file.name for file in (models / ".calibration").iterdir()] == [f"{model_revision(tiny)}.safetensors"]
    assert load_calibration(tiny)


def test_a_sound_file_is_not_made_again_and_a_damaged_one_is(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure_calibrated(tiny, unseen)
    vectors = load_calibration(tiny)
    with monkeypatch.context() as patched:
        patched.setattr(calibration, "calibrate", lambda *_: pytest.fail("a sound file must be used"))
        ensure_calibrated(tiny, unseen)
    kept = calibration.calibration_file(tiny, model_revision(tiny))
    kept.write_bytes(kept.read_bytes()[:100])
    ensure_calibrated(tiny, unseen)
    again = load_calibration(tiny)
    assert all(torch.equal(again[name], vector) for name, vector in vectors.items())


def test_import_calibrates_and_says_so(models: Path, tmp_path: Path) -> None:
    file = TinyGguf("llama").write(tmp_path / "tiny.gguf")
    result = CliRunner().invoke(app, ["import", str(file), "--name", "mine"])
    assert result.exit_code == 0
    assert "measuring activations" in result.stderr
    assert load_calibration(models / "mine")


def test_a_model_imported_before_gets_its_vectors_with_the_next_import(models: Path, tmp_path: Path) -> None:
    file = TinyGguf("llama").write(tmp_path / "tiny.gguf")
    import_gguf(file, models / "mine")
    with pytest.raises(ModelFileError, match="missing"):
        load_calibration(models / "mine")
    assert CliRunner().invoke(app, ["import", str(models / "mine"), "--name", "mine"]).exit_code == 0
    assert load_calibration(models / "mine")


@pytest.mark.parametrize(
    ("formats", "is_needed"),
    [({}, False), ({"quantization": "int8"}, True), ({"decode_quantization": "int4"}, True), ({"kv_dtype": "int8"}, False)],
)
def test_a_cluster_calibrates_a_directory_when_its_formats_need_it(
    models: Path, tiny: Path, formats: dict[str, str], is_needed: bool
) -> None:
    messages: list[str] = []
    settings = EngineSettings.load(flags=formats, env={})
    ensure_ready(resolve(str(tiny)), settings, lambda message, _share: messages.append(message))
    assert list(models.glob(".calibration/*.safetensors")) == (
        [calibration.calibration_file(tiny, model_revision(tiny))] if is_needed else []
    )
    assert bool(messages) == is_needed
    messages.clear()
    ensure_ready(resolve(str(tiny)), settings, lambda message, _share: messages.append(message))
    assert not messages


def changed(change: Callable[[dict[str, torch.Tensor]], object], revision: str | None = None) -> Callable[[Path, str], None]:
    def write(file: Path, own_revision: str) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"model_revision": revision or own_revision})

    return write


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda file, _: file.unlink(), "is missing"),
        (lambda file, _: file.write_bytes(b"nonsense"), "cannot be read"),
        (lambda file, _: file.write_bytes(file.read_bytes()[:-1]), "cannot be read"),
        (changed(lambda _: None, revision="0123"), "was made for other weights"),
        (changed(lambda tensors: tensors.pop("head")), "lacks head as 64 float32 numbers"),
        (changed(lambda tensors: tensors.update(head=torch.ones(63))), "lacks head"),
        (changed(lambda tensors: tensors.update(head=torch.ones(64).half())), "lacks head"),
        (changed(lambda tensors: tensors["head"][3].zero_()), "numbers in head that are not positive"),
        (changed(lambda tensors: tensors["layers.1.down"][3].fill_(torch.nan)), "layers.1.down that are not positive"),
    ],
)
def test_what_is_unsound_is_named(tiny: Path, damage: Callable[[Path, str], None], problem: str) -> None:
    ensure_calibrated(tiny, unseen)
    file = calibration.calibration_file(tiny, model_revision(tiny))
    damage(file, model_revision(tiny))
    with pytest.raises(ModelFileError, match=problem) as caught:
        load_calibration(tiny)
    assert str(file) in caught.value.message
    assert "segue models import" in caught.value.message


def test_a_store_that_cannot_be_written_is_named(tiny: Path, models: Path) -> None:
    models.parent.mkdir()
    models.write_text("in the way")
    with pytest.raises(ModelFileError, match=r"cannot write .*safetensors: .*SEGUE_HOME"):
        save_calibration(tiny, {})


def test_the_text_is_long_enough_and_in_the_models_own_tokens(tiny: Path) -> None:
    tokens = calibration_tokens(tiny)
    assert len(tokens) > 4000
    assert len(set(tokens)) > 80


def test_a_tokenizer_that_cannot_be_used_is_named(tiny: Path) -> None:
    (tiny / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        calibration_tokens(tiny)


@pytest.mark.parametrize("tokens", [[], [5, 10_000]])
def test_tokens_of_another_vocabulary_are_refused(tiny: Path, tokens: list[int]) -> None:
    with pytest.raises(ModelFileError, match=r"tokenizer\.json.*vocab_size"):
        calibrate(tiny, tokens)
