"""Writes tiny GGUF files of random weights, as llama.cpp's converter would, for the tests of the importer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as BlockFormat
from tokenizers import pre_tokenizers

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
CONTEXT = 256

CONTROL_TOKENS = ("<|start|>", "<|end|>", "<|pad|>")
USER_TOKEN = "<tool>"
MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Ġ"), ("1", "2"), ("12", "3"), ("Ã", "©"), ("Ċ", "Ċ"))
CHAT_TEMPLATE = "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"

# What a key or tensor is set to in order to leave it out.
ABSENT = object()

Array = npt.NDArray[np.float32]


def vocabulary() -> tuple[list[str], list[int]]:
    """Tokens and their GGUF types: the byte alphabet, merged ones, one unused, one defined by the user, three of control."""
    normal = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(merge) for merge in MERGES]
    tokens = [*normal, "[unused]", USER_TOKEN, *CONTROL_TOKENS]
    return tokens, [1] * len(normal) + [5, 4, 3, 3, 3]


@dataclass
class TinyGguf:
    """A file to be: `weights` are the Hugging Face arrays that an import should give back, `keys` all metadata."""

    architecture: str
    block_format: BlockFormat = BlockFormat.F32
    tied: bool = True
    biases: bool = False
    keys: dict[str, Any] = field(default_factory=dict)
    extra_tensors: Mapping[str, Any] = field(default_factory=dict)
    weights: dict[str, Array] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in (self._default_keys() | self.keys).items():
            _add_key(writer, key, value)
        for name, array in (self._default_tensors() | self.extra_tensors).items():
            if array is ABSENT:
                continue
            block_format = self.block_format if array.ndim == 2 else BlockFormat.F32
            writer.add_tensor(name, gguf.quantize(array, block_format), raw_dtype=block_format)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def _default_keys(self) -> dict[str, Any]:
        tokens, types = vocabulary()
        sizes = {
            "block_count": LAYERS,
            "context_length": CONTEXT,
            "embedding_length": HIDDEN,
            "feed_forward_length": INNER,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.key_length": HEAD_DIM,
            "attention.value_length": HEAD_DIM,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 50_000.0,
        }
        tokenizer = {
            "ggml.model": "gpt2",
            "ggml.pre": "qwen2",
            "ggml.tokens": tokens,
            "ggml.token_type": types,
            "ggml.merges": [" ".join(merge) for merge in MERGES],
            "ggml.bos_token_id": tokens.index("<|start|>"),
            "ggml.eos_token_id": tokens.index("<|end|>"),
            "ggml.padding_token_id": tokens.index("<|pad|>"),
            "ggml.add_bos_token": False,
            "chat_template": CHAT_TEMPLATE,
        }
        return {f"{self.architecture}.{name}": value for name, value in sizes.items()} | {
            f"tokenizer.{name}": value for name, value in tokenizer.items()
        }

    def _default_tensors(self) -> dict[str, Any]:
        random = np.random.default_rng(7)
        tensors: dict[str, Any] = {}

        def add(stored_name: str, name: str, shape: Sequence[int], rotated_heads: int = 0) -> None:
            array = random.standard_normal(shape).astype(np.float32)
            block_format = self.block_format if array.ndim == 2 else BlockFormat.F32
            self.weights[name] = gguf.dequantize(gguf.quantize(array, block_format), block_format)
            tensors[stored_name] = interleaved(array, rotated_heads) if rotated_heads else array

        is_llama = self.architecture == "llama"
        add("token_embd.weight", "model.embed_tokens.weight", (len(vocabulary()[0]), HIDDEN))
        for layer in range(LAYERS):
            ours, theirs = f"blk.{layer}", f"model.layers.{layer}"
            for stored, name, rows, columns, rotated in (
                ("attn_q", "self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN, HEADS),
                ("attn_k", "self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN, KV_HEADS),
                ("attn_v", "self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN, 0),
                ("attn_output", "self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM, 0),
                ("ffn_gate", "mlp.gate_proj", INNER, HIDDEN, 0),
                ("ffn_up", "mlp.up_proj", INNER, HIDDEN, 0),
                ("ffn_down", "mlp.down_proj", HIDDEN, INNER, 0),
            ):
                heads = rotated if is_llama else 0
                add(f"{ours}.{stored}.weight", f"{theirs}.{name}.weight", (rows, columns), heads)
                if self.biases or (self.architecture == "qwen2" and stored in {"attn_q", "attn_k", "attn_v"}):
                    add(f"{ours}.{stored}.bias", f"{theirs}.{name}.bias", (rows,), heads)
            add(f"{ours}.attn_norm.weight", f"{theirs}.input_layernorm.weight", (HIDDEN,))
            add(f"{ours}.ffn_norm.weight", f"{theirs}.post_attention_layernorm.weight", (HIDDEN,))
            if self.architecture == "qwen3":
                add(f"{ours}.attn_q_norm.weight", f"{theirs}.self_attn.q_norm.weight", (HEAD_DIM,))
                add(f"{ours}.attn_k_norm.weight", f"{theirs}.self_attn.k_norm.weight", (HEAD_DIM,))
        add("output_norm.weight", "model.norm.weight", (HIDDEN,))
        if not self.tied:
            add("output.weight", "lm_head.weight", (len(vocabulary()[0]), HIDDEN))
        return tensors


def interleaved(array: Array, num_heads: int) -> Array:
    """The two halves of each head's rows laid out in turn, as llama.cpp stores q and k of llama networks."""
    halves = array.reshape(num_heads, 2, array.shape[0] // num_heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def _add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list() if value:
            writer.add_array(key, value)
