"""What a GGUF file's metadata and tensor names mean in a Hugging Face directory: config.json and the weights' names.

Pure functions over an opened file. What is not understood is refused: a key or tensor that is left out silently would change
the model's answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from segue.models.config import LLAMA, QWEN2, QWEN3
from segue.models.gguf_file import GgufFile, TensorInfo

# GGUF's general.architecture: our config's (architecture, model_type). Mistral's models say "llama", being the same network.
ARCHITECTURES = {"llama": (LLAMA, "llama"), "qwen2": (QWEN2, "qwen2"), "qwen3": (QWEN3, "qwen3")}

ROPE_FACTORS = "rope_freqs.weight"
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LLAMA3_ORIGINAL_CONTEXT = 8192
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of model.safetensors and where it comes from. `row_order` is None where rows stay as they are."""

    name: str
    shape: tuple[int, ...]
    source: TensorInfo
    row_order: npt.NDArray[np.intp] | None


def network_config(file: GgufFile) -> dict[str, Any]:
    """The config.json of `file`, in the keys of transformers 4. Raises ModelFileError for what the engine cannot run."""
    kind = file.require("general.architecture", str)
    if kind not in ARCHITECTURES:
        raise file.error(f"the architecture {kind!r} is not supported, only {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(file, kind)
    architecture, model_type = ARCHITECTURES[kind]
    num_heads = _positive(file, f"{kind}.attention.head_count")
    hidden_size = _positive(file, f"{kind}.embedding_length")
    has = file.tensors.__contains__
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": _positive(file, f"{kind}.feed_forward_length"),
        "num_hidden_layers": _positive(file, f"{kind}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _positive(file, f"{kind}.attention.head_count_kv", default=num_heads),
        "head_dim": _head_dim(file, kind, hidden_size, num_heads),
        "max_position_embeddings": _positive(file, f"{kind}.context_length"),
        "rms_norm_eps": _short_float(file.require(f"{kind}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _short_float(file.optional(f"{kind}.rope.freq_base", float, 10_000.0)),
        "tie_word_embeddings": not has("output.weight"),
        "vocab_size": len(file.require("tokenizer.ggml.tokens", list)),
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if architecture != QWEN2:
        config["attention_bias"] = has("blk.0.attn_q.bias")
    if architecture == LLAMA:
        config["mlp_bias"] = has("blk.0.ffn_up.bias")
    if (scaling := _rope_scaling(file, kind, config)) is not None:
        config["rope_scaling"] = scaling
    return config


def network_weights(file: GgufFile, config: dict[str, Any]) -> list[Weight]:
    """The weights that `config` needs, in the order in which the network uses them.

    Raises ModelFileError when one is missing, has another shape than `config` says, or is left over.
    """
    if config["num_hidden_layers"] > len(file.tensors):
        raise file.error(f"{config['num_hidden_layers']} layers are named, but only {len(file.tensors)} tensors stored")
    weights = []
    for stored_name, name, shape in _expected(config):
        if stored_name not in file.tensors:
            raise file.error(f"the tensor {stored_name} is missing", field=stored_name)
        source = file.tensors[stored_name]
        if source.shape != shape:
            raise file.error(
                f"the tensor {stored_name} has the shape {source.shape} where {shape} is needed", field=stored_name
            )
        weights.append(Weight(name, shape, source, _row_order(config, name, shape)))
    unused = file.tensors.keys() - {weight.source.name for weight in weights} - {ROPE_FACTORS}
    if unused:
        shown = ", ".join(sorted(unused)[:3])
        raise file.error(f"{len(unused)} tensors are not part of a {config['model_type']} network as we know it: {shown}")
    return weights


def _refuse_unsupported(file: GgufFile, kind: str) -> None:
    if (parts := file.optional("split.count", int, 1)) > 1:
        raise file.error(f"one of {parts} parts of a model; merge them into one file first")
    if experts := file.optional(f"{kind}.expert_count", int, 0):
        raise file.error(f"a mixture of {experts} experts is not supported")
    context = file.optional(f"{kind}.context_length", int, 0)
    if file.optional(f"{kind}.attention.sliding_window", int, context) < context:
        raise file.error(f"{kind}.attention.sliding_window: sliding windows are not supported")


def _positive(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.require(key, int) if default is None else file.optional(key, int, default)
    if not 0 < value < 2**31:
        raise file.error(f"the metadata key {key} must be above 0, not {value}", field=key)
    return value


def _short_float(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 where the file's float32 reads 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _head_dim(file: GgufFile, kind: str, hidden_size: int, num_heads: int) -> int:
    head_dim = _positive(file, f"{kind}.attention.key_length", default=max(1, hidden_size // num_heads))
    for key in (f"{kind}.attention.value_length", f"{kind}.rope.dimension_count"):
        if (other := file.optional(key, int, head_dim)) != head_dim:
            raise file.error(f"{key} is {other}, but only the size of a head ({head_dim}) is supported", field=key)
    if head_dim % 2:
        raise file.error(f"heads of {head_dim} values cannot be rotated, an even number is needed")
    return head_dim


def _rope_scaling(file: GgufFile, kind: str, config: dict[str, Any]) -> dict[str, Any] | None:
    type_key, factor_key = f"{kind}.rope.scaling.type", f"{kind}.rope.scaling.factor"
    # Older files name no type, or the factor of a linear scaling under its first name.
    old_factor = file.optional(f"{kind}.rope.scale_linear", float, 1.0)
    factor = file.optional(factor_key, float, old_factor)
    scaling = file.optional(type_key, str, "none" if factor == 1.0 else "linear")
    if ROPE_FACTORS in file.tensors and scaling == "none":
        return _llama3_scaling(file, file.tensors[ROPE_FACTORS], config, f"{kind}.rope.scaling.original_context_length")
    if scaling == "none":
        return None
    if scaling != "linear" or ROPE_FACTORS in file.tensors:
        raise file.error(f"{type_key}: {scaling!r} is not supported, only linear and Llama 3's", field=type_key)
    if not (math.isfinite(factor) and factor > 0):
        raise file.error(f"the metadata key {factor_key} must be above 0, not {factor}", field=factor_key)
    return {"rope_type": "linear", "factor": _short_float(factor)}


def _llama3_scaling(file: GgufFile, tensor: TensorInfo, config: dict[str, Any], context_key: str) -> dict[str, Any]:
    """Llama 3's scaling is stored as what it comes to: the divisor of each frequency, [head_dim / 2]. Its parameters are found
    again and checked: the largest divisor is the factor, the others are the same in all of Llama's releases."""
    if tensor.shape != (config["head_dim"] // 2,):
        raise file.error(f"the tensor {ROPE_FACTORS} has the shape {tensor.shape}, not ({config['head_dim'] // 2},)")
    stored = np.concatenate([chunk.reshape(-1) for chunk in file.read_chunks(tensor)]).astype(np.float64)
    factor = float(stored.max())
    original = _positive(file, context_key, default=_LLAMA3_ORIGINAL_CONTEXT)
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, config["head_dim"], 2) / config["head_dim"])
    smooth = np.clip((original / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0, 1.0)
    if not np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise file.error(f"the tensor {ROPE_FACTORS} does not hold Llama 3's scaling of {original} positions; not supported")
    return {
        "rope_type": "llama3",
        "factor": _short_float(factor),
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": original,
    }


def _expected(config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name in GGUF, name in Hugging Face, shape) of each weight."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "token_embd.weight", f"{_TOP_NAMES['token_embd']}.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        for part, shape in _layer_parts(config).items():
            stem, suffix = part.split(".")
            yield f"blk.{layer}.{part}", f"model.layers.{layer}.{_LAYER_NAMES[stem]}.{suffix}", shape
    yield "output_norm.weight", f"{_TOP_NAMES['output_norm']}.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "output.weight", f"{_TOP_NAMES['output']}.weight", (vocab, hidden)


def _layer_parts(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    matrices = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    biased: tuple[str, ...] = ()
    if config["architectures"] == [QWEN2]:
        biased += ("attn_q", "attn_k", "attn_v")
    elif config["attention_bias"]:
        biased += ("attn_q", "attn_k", "attn_v", "attn_output")
    if config.get("mlp_bias"):
        biased += ("ffn_gate", "ffn_up", "ffn_down")
    parts: dict[str, tuple[int, ...]] = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
    parts |= {f"{name}.weight": shape for name, shape in matrices.items()}
    parts |= {f"{name}.bias": matrices[name][:1] for name in biased}
    if config["architectures"] == [QWEN3]:
        parts |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    return parts


def _row_order(config: dict[str, Any], name: str, shape: tuple[int, ...]) -> npt.NDArray[np.intp] | None:
    """In llama networks llama.cpp rotates neighbouring values of a head, Hugging Face value i with value i + head_dim/2; so
    GGUF stores the rows of q and k interleaved. Hugging Face's row (head, half, i) is the stored row (head, i, half)."""
    if config["architectures"] != [LLAMA] or not (".q_proj." in name or ".k_proj." in name):
        return None
    half = config["head_dim"] // 2
    return np.arange(shape[0], dtype=np.intp).reshape(-1, half, 2).swapaxes(1, 2).reshape(-1)
