"""Damaged and unsupported files: each is refused with what is wrong with it, never with another library's exception."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as BlockFormat
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from segue.errors import ModelFileError
from segue.models.gguf_import import import_gguf
from tests.support.gguf_files import ABSENT, HEAD_DIM, HIDDEN, MERGES, TinyGguf, vocabulary

TOKENS, TYPES = vocabulary()


def refusal(file: Path, tmp_path: Path) -> str:
    store = tmp_path / "store"
    with pytest.raises(ModelFileError) as caught:
        import_gguf(file, store / "a")
    assert not store.exists() or list(store.iterdir()) == []
    assert str(file) in caught.value.message
    return caught.value.message


def sound_bytes(tmp_path: Path) -> bytes:
    return TinyGguf("llama", BlockFormat.Q8_0).write(tmp_path / "sound.gguf").read_bytes()


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("general.architecture", "gemma3", "architecture 'gemma3' is not supported, only llama, qwen2, qwen3"),
        ("general.architecture", 7, "general.architecture must be of type str, not 7"),
        ("general.alignment", 48, "general.alignment must be a power of two"),
        ("split.count", 3, "one of 3 parts"),
        ("llama.block_count", 0, "llama.block_count must be above 0"),
        ("llama.block_count", 3, "the tensor blk.2.attn_norm.weight is missing"),
        ("llama.block_count", 1, "tensors are not part of a llama network as we know it: blk.1."),
        ("llama.block_count", 2**31 - 1, "2147483647 layers are named, but only"),
        ("llama.expert_count", 8, "a mixture of 8 experts"),
        ("llama.embedding_length", 32, "has the shape"),
        ("llama.embedding_length", "wide", "llama.embedding_length must be of type int, not 'wide'"),
        ("llama.attention.head_count", [4, 4], "llama.attention.head_count must be of type int"),
        ("llama.attention.head_count_kv", 4, "attn_k.weight has the shape (32, 64) where (64, 64) is needed"),
        ("llama.attention.value_length", 8, "llama.attention.value_length is 8"),
        ("llama.attention.key_length", 15, "15"),
        ("llama.rope.dimension_count", 8, "llama.rope.dimension_count is 8"),
        ("llama.rope.scaling.type", "yarn", "'yarn' is not supported"),
        ("llama.rope.scaling.factor", -1.0, "llama.rope.scaling.factor must be above 0"),
        ("llama.rope.freq_base", float("inf"), "rope_theta"),
        ("llama.attention.sliding_window", 16, "sliding windows are not supported"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "rms_norm_eps"),
        ("tokenizer.ggml.model", "llama", "tokenizer kind 'llama' is not supported"),
        ("tokenizer.ggml.pre", "tekken", "splitting text 'tekken' (tokenizer.ggml.pre) is not supported"),
        ("tokenizer.ggml.tokens", TOKENS[:-1], "token_embd.weight has the shape"),
        ("tokenizer.ggml.tokens", [*TOKENS[:-1], TOKENS[0]], "the same token twice"),
        ("tokenizer.ggml.tokens", list(range(len(TOKENS))), "tokenizer.ggml.tokens must be a list of texts"),
        ("tokenizer.ggml.token_type", TYPES[:-1], f"tokenizer.ggml.token_type must be a list of {len(TOKENS)}"),
        ("tokenizer.ggml.merges", ["the"], "holds 'the', which is not a pair"),
        ("tokenizer.ggml.merges", ["z z"], "holds 'z z', whose tokens are not all in the vocabulary"),
        ("tokenizer.ggml.eos_token_id", 70_000, "tokenizer.ggml.eos_token_id is 70000, which is outside the vocabulary"),
        ("tokenizer.ggml.eos_token_id", 2**32 - 1, "tokenizer.ggml.eos_token_id is missing"),
        ("tokenizer.chat_template", 5, "tokenizer.chat_template must be of type str"),
    ],
)
def test_a_bad_key_is_named(key: str, value: Any, problem: str, tmp_path: Path) -> None:
    file = TinyGguf("llama", keys={key: value}).write(tmp_path / "a.gguf")
    assert problem in refusal(file, tmp_path)


@pytest.mark.parametrize(
    "key",
    [
        "llama.block_count",
        "llama.context_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.eos_token_id",
    ],
)
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    file = TinyGguf("llama", keys={key: ABSENT}).write(tmp_path / "a.gguf")
    assert f"the metadata key {key} is missing" in refusal(file, tmp_path)


def test_a_bos_token_that_is_asked_for_must_be_there(tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": ABSENT}
    file = TinyGguf("llama", keys=keys).write(tmp_path / "a.gguf")
    assert "tokenizer.ggml.bos_token_id is missing" in refusal(file, tmp_path)


@pytest.mark.parametrize(
    ("architecture", "name", "array", "problem"),
    [
        ("llama", "blk.1.ffn_up.weight", ABSENT, "the tensor blk.1.ffn_up.weight is missing"),
        ("qwen2", "blk.0.attn_k.bias", ABSENT, "the tensor blk.0.attn_k.bias is missing"),
        ("qwen3", "blk.0.attn_q_norm.weight", ABSENT, "the tensor blk.0.attn_q_norm.weight is missing"),
        ("llama", "output_norm.weight", np.ones(HIDDEN // 2, np.float32), "output_norm.weight has the shape (32,)"),
        ("llama", "blk.0.ffn_gate_inp.weight", np.ones((2, 32), np.float32), "1 tensors are not part of a llama network"),
        ("llama", "blk.0.attn_q.bias", np.ones(64, np.float32), "the tensor blk.0.attn_k.bias is missing"),
        ("llama", "rope_freqs.weight", np.ones(3, np.float32), "rope_freqs.weight has the shape (3,)"),
        ("llama", "rope_freqs.weight", np.arange(1, 9, dtype=np.float32), "does not hold Llama 3's scaling"),
    ],
)
def test_a_bad_tensor_is_named(architecture: str, name: str, array: Any, problem: str, tmp_path: Path) -> None:
    assert HEAD_DIM // 2 == 8
    file = TinyGguf(architecture, extra_tensors={name: array}).write(tmp_path / "a.gguf")
    assert problem in refusal(file, tmp_path)


def test_a_file_that_is_no_gguf_file(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    assert "cannot read" in refusal(file, tmp_path)
    file.write_bytes(b"")
    assert "the file is empty" in refusal(file, tmp_path)
    file.write_bytes(b"<html>not found</html>")
    assert "not a GGUF file: it begins with b'<htm'" in refusal(file, tmp_path)


@pytest.mark.parametrize(("version", "problem"), [(1, "GGUF version 1"), (4, "GGUF version 4"), (3 << 24, "a big-endian file")])
def test_other_versions_are_refused(version: int, problem: str, tmp_path: Path) -> None:
    content = bytearray(sound_bytes(tmp_path))
    content[4:8] = struct.pack("<I", version)
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    assert f"{problem} is not supported" in refusal(file, tmp_path)


@pytest.mark.parametrize(("block_format", "problem"), [(200, "unknown block format 200"), (24, "I8, which is unsupported")])
def test_other_block_formats_are_refused(block_format: int, problem: str, tmp_path: Path) -> None:
    content = bytearray(sound_bytes(tmp_path))
    name = b"output_norm.weight"
    at = content.index(name) + len(name) + 4 + 8
    content[at : at + 4] = struct.pack("<I", block_format)
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    assert problem in refusal(file, tmp_path)


def test_a_length_beyond_the_file_is_not_believed(tmp_path: Path) -> None:
    content = bytearray(sound_bytes(tmp_path))
    name = b"tokenizer.ggml.merges"
    at = content.index(name) + len(name) + 4 + 4
    content[at : at + 8] = struct.pack("<Q", 2**62)
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    assert "truncated or damaged: the metadata key tokenizer.ggml.merges" in refusal(file, tmp_path)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    content = sound_bytes(tmp_path).replace(b"llama.rope.freq_base", b"llama.context_length")
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    assert "llama.context_length stands twice" in refusal(file, tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.999999)
def test_a_truncated_file_is_refused_wherever_it_ends(share: float, tmp_path: Path) -> None:
    content = sound_bytes(tmp_path)
    file = tmp_path / "a.gguf"
    file.write_bytes(content[: int(len(content) * share)])
    message = refusal(file, tmp_path)
    assert "truncated" in message or "empty" in message or "not a GGUF file" in message


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_garbled_header_ends_in_an_import_or_a_refusal(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(sound_bytes(tmp_path))
    header_end = content.index(b"output_norm.weight") + 60
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(4, header_end))] = data.draw(st.integers(0, 255))
    file = tmp_path / "garbled.gguf"
    file.write_bytes(content)
    destination = tmp_path / "garbled"
    problem = None
    try:
        import_gguf(file, destination)
    except ModelFileError as error:
        problem = error.message
    assert destination.is_dir() if problem is None else str(file) in problem
    shutil.rmtree(destination, ignore_errors=True)


def test_the_merges_of_the_tiny_files_are_sound() -> None:
    assert {"".join(merge) for merge in MERGES} <= set(TOKENS)
