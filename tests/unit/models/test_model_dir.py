"""A damaged model directory is refused before it is loaded; a fingerprint tells weights apart."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from segue.errors import ModelFileError
from segue.models.digest import file_digest
from segue.models.gguf_import import import_gguf
from segue.models.model_dir import INDEX_NAME, check_model_dir, model_revision
from segue.models.safetensors_file import Float32Writer, read_header
from tests.support.gguf_files import TinyGguf


@pytest.fixture(autouse=True)
def segue_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_HOME", str(tmp_path / "home"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    import_gguf(TinyGguf("llama").write(tmp_path / "tiny.gguf"), tmp_path / "model")
    return tmp_path / "model"


def split_in_two(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = {}
    for number, names in enumerate([sorted(weights)[::2], sorted(weights)[1::2]], start=1):
        file_name = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, model / file_name)
        index |= dict.fromkeys(names, file_name)
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": index}))


def change_text(name: str, content: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text(content) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def change_weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        file = model / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return apply


def with_header(header: object) -> Callable[[bytes], bytes]:
    text = json.dumps(header).encode()
    return lambda _content: struct.pack("<Q", len(text)) + text


def test_a_sound_directory_passes(model: Path) -> None:
    check_model_dir(model)
    split_in_two(model)
    check_model_dir(model)


@pytest.mark.parametrize(
    ("damage", "file_name", "problem"),
    [
        (remove("config.json"), "config.json", "cannot read"),
        (change_text("config.json", "{"), "config.json", "not valid JSON"),
        (change_text("config.json", '{"architectures": ["BertModel"]}'), "config.json", "architectures"),
        (remove("tokenizer.json"), "tokenizer.json", "cannot read"),
        (change_text("tokenizer.json", "[1]"), "tokenizer.json", "must hold a JSON object"),
        (change_text("tokenizer.json", '{"version": "1.0"}'), "tokenizer.json", "has no model"),
        (remove("model.safetensors"), "model", "holds no .safetensors file"),
        (change_weights(lambda content: content[:-1]), "model.safetensors", "bytes long where its header says"),
        (change_weights(lambda content: content + b"\0"), "model.safetensors", "bytes long where its header says"),
        (change_weights(lambda content: content[:100]), "model.safetensors", "cut off within its header"),
        (change_weights(lambda _: b""), "model.safetensors", "not a safetensors file"),
        (change_weights(lambda _: b"<html>not found</html>"), "model.safetensors", "not a safetensors file"),
        (change_weights(lambda content: content[:8] + b"x" + content[9:]), "model.safetensors", "not valid JSON"),
        (change_weights(with_header([])), "model.safetensors", "not valid JSON"),
        (change_weights(with_header({"a": {"dtype": "F32"}})), "model.safetensors", "the tensor a is wrong"),
        (
            change_weights(with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}})),
            "model.safetensors",
            "the tensor a is wrong",
        ),
        (change_text(INDEX_NAME, '{"weight_map": {"a": "other.safetensors"}}'), "other.safetensors", "cannot read"),
        (change_text(INDEX_NAME, '{"weight_map": {"a": "model.safetensors"}}'), "model.safetensors", "lacks the tensor a"),
        (change_text(INDEX_NAME, '{"weight_map": {"a": "../model.safetensors"}}'), INDEX_NAME, "weight_map"),
        (change_text(INDEX_NAME, '{"weight_map": 5}'), INDEX_NAME, "weight_map"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], file_name: str, problem: str, model: Path) -> None:
    damage(model)
    with pytest.raises(ModelFileError) as caught:
        check_model_dir(model)
    assert file_name in caught.value.message
    assert problem in caught.value.message


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="nowhere is not a directory"):
        check_model_dir(tmp_path / "nowhere")


def test_equal_content_has_one_revision_wherever_it_lies(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    assert model_revision(tmp_path / "copy") == model_revision(model)


def test_one_changed_byte_of_the_weights_changes_the_revision(model: Path) -> None:
    before = model_revision(model)
    change_weights(lambda content: content[:-1] + bytes([content[-1] ^ 1]))(model)
    check_model_dir(model)
    assert model_revision(model) != before


def test_another_config_changes_the_revision(model: Path) -> None:
    before = model_revision(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 123.0}))
    assert model_revision(model) != before


def test_another_tokenizer_does_not(model: Path) -> None:
    before = model_revision(model)
    change_text("tokenizer_config.json", "{}")(model)
    assert model_revision(model) == before


def test_the_digest_of_a_large_file_is_kept_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "large"
    file.write_bytes(bytes(2**20))
    first = file_digest(file)
    with monkeypatch.context() as patched:
        patched.setattr("hashlib.file_digest", lambda *_: pytest.fail("the kept digest must be used"))
        assert file_digest(file) == first
    file.write_bytes(b"\1" * 2**20)
    os.utime(file, (1, 1))
    assert file_digest(file) != first


def test_digests_do_without_a_store_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("in the way")
    file = tmp_path / "large"
    file.write_bytes(bytes(2**20))
    assert file_digest(file) == file_digest(file)


def test_a_missing_file_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"cannot read .*nowhere"):
        file_digest(tmp_path / "nowhere")


def test_what_is_written_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([7.5], dtype=np.float32)}
    with Float32Writer(tmp_path / "w.safetensors", [(name, array.shape) for name, array in arrays.items()]) as writer:
        for array in arrays.values():
            writer.write(array[start : start + 1] for start in range(len(array)))
    found = load_file(tmp_path / "w.safetensors")
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    header = read_header(tmp_path / "w.safetensors")
    assert header.names == {"a", "b"}
    assert header.data_start % 8 == 0


def test_too_little_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="were announced"):
        with Float32Writer(tmp_path / "w.safetensors", [("a", (2, 3))]) as writer:
            writer.write([np.ones((1, 3), dtype=np.float32)])
