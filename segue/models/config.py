"""What a model directory's config.json says about the network, checked; shared by the engine and the router (no torch here).

The four architectures differ in a few facts only (biases, q/k norm, sliding window). They are turned into plain fields here,
so that the engine has one decoder and never asks for an architecture's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any

from segue.errors import ConfigError
from segue.models.json_fields import JsonFields

LLAMA = "LlamaForCausalLM"
MISTRAL = "MistralForCausalLM"
QWEN2 = "Qwen2ForCausalLM"
QWEN3 = "Qwen3ForCausalLM"
ARCHITECTURES = (LLAMA, MISTRAL, QWEN2, QWEN3)

# What transformers takes where a config.json says nothing.
_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_MISTRAL_WINDOW = 4096


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """All positions are divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Low frequencies are divided by `factor`, high ones are kept, those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class RopeConfig:
    theta: float
    scaling: Llama3Scaling | LinearScaling | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    # Longest prompt plus output, in tokens, for which the engine's full attention is exact.
    max_context: int
    tie_embeddings: bool
    # Biases of the q, k and v projections.
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    # RMSNorm over each head of q and k, before the rotary embedding.
    qk_norm: bool
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def tensor_parallel_degrees(self) -> tuple[int, ...]:
        """How many ranks the network can be cut into: all get as many kv heads, with the heads that use them, and as much of
        the MLP."""
        common = gcd(self.num_kv_heads, self.intermediate_size)
        return tuple(degree for degree in range(1, common + 1) if common % degree == 0)

    def check_tensor_parallel(self, degree: int, field: str) -> None:
        """Raises ConfigError, naming `field` and its possible values, when the network cannot be cut into that many ranks."""
        if degree not in self.tensor_parallel_degrees:
            possible = ", ".join(map(str, self.tensor_parallel_degrees))
            raise ConfigError(
                f"{field}: {degree} ranks cannot share {self.num_heads} heads, {self.num_kv_heads} kv heads and an MLP of "
                f"{self.intermediate_size} evenly; this model takes {possible}",
                field=field,
            )

    @classmethod
    def from_dir(cls, path: Path) -> ModelConfig:
        """Reads config.json and, for the end-of-sequence tokens, generation_config.json where there is one.

        Raises ModelFileError that names the file and the field for what is missing, of a wrong type or not supported.
        """
        fields = JsonFields.read(path / "config.json")
        architecture = _architecture(fields)
        _refuse_unsupported(fields)
        hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        num_kv_heads = fields.integer("num_key_value_heads", default=num_heads if architecture == LLAMA else None)
        if num_heads % num_kv_heads:
            raise fields.error("num_key_value_heads", f"must divide num_attention_heads ({num_heads}), not {num_kv_heads}")
        any_bias = fields.boolean("attention_bias", default=False) if architecture in {LLAMA, QWEN3} else False
        return cls(
            architecture=architecture,
            num_layers=fields.integer("num_hidden_layers"),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(fields, architecture, hidden_size, num_heads),
            intermediate_size=fields.integer("intermediate_size"),
            vocab_size=fields.integer("vocab_size"),
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope=_rope(fields),
            max_context=_max_context(fields, architecture),
            tie_embeddings=fields.boolean("tie_word_embeddings", default=False),
            attention_bias=any_bias or architecture == QWEN2,
            attention_output_bias=any_bias,
            mlp_bias=fields.boolean("mlp_bias", default=False) if architecture == LLAMA else False,
            qk_norm=architecture == QWEN3,
            eos_token_ids=_eos_token_ids(path, fields, architecture),
            bos_token_id=_bos_token_id(fields, architecture),
        )


def _architecture(fields: JsonFields) -> str:
    names = fields.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise fields.error("architectures", f"must be a list of one of {', '.join(ARCHITECTURES)}, not {names!r}")
    return str(names[0])


def _refuse_unsupported(fields: JsonFields) -> None:
    """Options that would change the answer and that the engine does not have."""
    if (activation := fields.get("hidden_act", default="silu")) != "silu":
        raise fields.error("hidden_act", f"only silu is supported, not {activation!r}")
    if fields.get("quantization_config") is not None:
        raise fields.error("quantization_config", "quantized weights are not supported; use the unquantized model")
    layer_types = fields.get("layer_types") or []
    if not isinstance(layer_types, list) or not set(map(str, layer_types)) <= {"full_attention", "sliding_attention"}:
        raise fields.error("layer_types", f"only full_attention and sliding_attention are supported, not {layer_types!r}")


def _head_dim(fields: JsonFields, architecture: str, hidden_size: int, num_heads: int) -> int:
    derived = hidden_size // num_heads if architecture != QWEN3 and hidden_size % num_heads == 0 else None
    head_dim = fields.integer("head_dim", default=derived)
    if head_dim % 2:
        raise fields.error("head_dim", f"must be even for rotary embeddings, not {head_dim}")
    return head_dim


def _max_context(fields: JsonFields, architecture: str) -> int:
    """Within a sliding window full attention is the same thing, so the window limits the context and nothing else."""
    max_position = fields.integer("max_position_embeddings")
    if architecture == MISTRAL:
        has_window = fields.get("sliding_window", default=_DEFAULT_MISTRAL_WINDOW) is not None
    elif architecture in {QWEN2, QWEN3}:
        has_window = fields.boolean("use_sliding_window", default=False)
        has_window = has_window and fields.get("sliding_window") is not None
    else:
        has_window = False
    if not has_window:
        return max_position
    return min(max_position, fields.integer("sliding_window", default=_DEFAULT_MISTRAL_WINDOW))


def _rope(fields: JsonFields) -> RopeConfig:
    """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (transformers 4)."""
    default_theta = fields.number("rope_theta", default=_DEFAULT_ROPE_THETA)
    for name in ("rope_parameters", "rope_scaling"):
        if fields.get(name) is not None:
            return _scaled_rope(fields.child(name), default_theta)
    return RopeConfig(default_theta)


def _scaled_rope(rope: JsonFields, default_theta: float) -> RopeConfig:
    theta = rope.number("rope_theta", default=default_theta)
    if rope.number("partial_rotary_factor", default=1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "rotating a part of each head is not supported")
    name = "rope_type" if rope.get("rope_type") is not None else "type"
    rope_type: Any = rope.get(name, default="default" if rope.get("rope_theta") is not None else None)
    if rope_type == "default":
        return RopeConfig(theta)
    if rope_type == "linear":
        return RopeConfig(theta, LinearScaling(rope.number("factor")))
    if rope_type == "llama3":
        scaling = Llama3Scaling(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position=rope.integer("original_max_position_embeddings"),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise rope.error("high_freq_factor", f"must be above low_freq_factor ({scaling.low_freq_factor})")
        return RopeConfig(theta, scaling)
    raise rope.error("rope_type", f"only default, linear and llama3 are supported, not {rope_type!r}")


def _eos_token_ids(path: Path, fields: JsonFields, architecture: str) -> tuple[int, ...]:
    generation_file = path / "generation_config.json"
    if generation_file.exists():
        generation = JsonFields.read(generation_file)
        if (value := generation.get("eos_token_id")) is not None:
            return _token_ids(generation, value)
    return _token_ids(fields, fields.get("eos_token_id", default=2 if architecture in {LLAMA, MISTRAL} else None))


def _token_ids(fields: JsonFields, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise fields.error("eos_token_id", f"must be a token id or a list of them, not {value!r}")
    return tuple(dict.fromkeys(ids))


def _bos_token_id(fields: JsonFields, architecture: str) -> int | None:
    value = fields.get("bos_token_id", default=1 if architecture in {LLAMA, MISTRAL} else None)
    return None if value is None else fields.integer("bos_token_id", default=value, minimum=0)
