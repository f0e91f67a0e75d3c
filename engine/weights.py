"""A model's weights, read from safetensors and put into the formats that a worker computes in: q, k, v in one matrix, gate and
up in another.

A rank of several holds some of each matrix's outputs, in their formats the same numbers as everybody else would: its heads of
q, k and v, its part of gate and up, and so on; the embedding and the norms are on all ranks.

Matrices are [outputs, inputs]. What need not be joined or converted is a view of the mapped file until a backend packs it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.linear import FloatWeight, Linear
from engine.parallel import WHOLE, Shard
from engine.quantization import quantize_int4, quantize_int8
from engine.tensor_files import TensorFiles
from segue.config import Quantization
from segue.errors import ModelFileError
from segue.models.config import ModelConfig

# Linear layers of one decoder layer, and the output head.
LINEAR_NAMES = ("qkv", "attention_output", "gate_up", "down", "head")


@dataclass(frozen=True, slots=True)
class WeightFormats:
    """How each linear layer's weights are held."""

    dtype: torch.dtype = torch.float32
    quantization: Quantization = "none"
    # Names of LINEAR_NAMES that stay in `dtype` all the same.
    keep_float: frozenset[str] = frozenset()
    # From engine/calibration.py: smoothing vectors [inputs] float32 of int8 layers by name: "layers.0.qkv", "head".
    smoothing: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def convert(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """weight: [outputs, inputs]; bias: [outputs] float32."""
        if self.quantization == "none" or name.rpartition(".")[2] in self.keep_float:
            return Linear(FloatWeight(weight.to(self.dtype)), bias)
        # The head stays finer than int4: it decides between tokens, and in int4 it alone would cost 4 % of perplexity.
        if self.quantization == "int8" or name == "head":
            quantized, input_scales = quantize_int8(weight, self.smoothing.get(name))
            return Linear(quantized, bias, input_scales)
        return Linear(quantize_int4(weight), bias)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """`num_heads` and so on are those of `Shard.of` the model; of each matrix the rank's outputs."""

    # Norms are float32.
    input_norm: torch.Tensor
    # [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]
    qkv: Linear
    # Repeated for each head: q's norm for the first num_heads, k's for the next num_kv_heads. [heads, head_dim]
    qk_norm: torch.Tensor | None
    # [hidden_size, num_heads * head_dim]
    attention_output: Linear
    mlp_norm: torch.Tensor
    # [2 * intermediate_size, hidden_size]
    gate_up: Linear
    # [hidden_size, intermediate_size]
    down: Linear


@dataclass(frozen=True, slots=True)
class ModelWeights:
    # [vocab_size, hidden_size] in the formats' dtype
    embedding: torch.Tensor
    # [vocab_size, hidden_size]
    head: Linear
    final_norm: torch.Tensor
    layers: list[LayerWeights]


def load_weights(model_dir: Path, config: ModelConfig, formats: WeightFormats, shard: Shard = WHOLE) -> ModelWeights:
    """The share `shard` of the model that `config` describes. Raises ModelFileError, naming tensor and file, for tensors that
    are missing, unexpected or of another shape."""
    reader = _Reader(TensorFiles(model_dir), config, formats, shard)
    embedding = reader.take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = [reader.layer(index) for index in range(config.num_layers)]
    final_norm = reader.norm("model.norm.weight", config.hidden_size)
    head = embedding if config.tie_embeddings else reader.take("lm_head.weight", config.vocab_size, config.hidden_size)
    reader.require_all_used()
    # A copy: backends pack everything else, and a single view left would keep the whole mapped file resident.
    table = embedding.to(formats.dtype, copy=True)
    return ModelWeights(table, formats.convert("head", head[shard.part(config.vocab_size)], None), final_norm, layers)


# Written by some exporters: derived from the configuration, or a second copy of a tied matrix.
_IGNORED = re.compile(r"lm_head\.weight|.*\.rotary_emb\.inv_freq")


class _Reader:
    def __init__(self, files: TensorFiles, config: ModelConfig, formats: WeightFormats, shard: Shard) -> None:
        self._files = files
        self._config = config
        self._formats = formats
        self._shard = shard
        self._used: set[str] = set()

    def take(self, name: str, *shape: int) -> torch.Tensor:
        tensor = self._files.read(name)
        if tuple(tensor.shape) != shape:
            raise ModelFileError(
                f"{self._files.file_of(name)}: {name} has shape {list(tensor.shape)}, but config.json asks for {list(shape)}"
            )
        if not tensor.is_floating_point():
            raise ModelFileError(f"{self._files.file_of(name)}: {name} holds {tensor.dtype}, not floating-point numbers")
        self._used.add(name)
        return tensor

    def norm(self, name: str, *shape: int) -> torch.Tensor:
        return self.take(name, *shape).to(torch.float32)

    def layer(self, index: int) -> LayerWeights:
        config, prefix = self._config, f"model.layers.{index}."
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv = {f"{attention}q_proj": query, f"{attention}k_proj": key_value, f"{attention}v_proj": key_value}
        gate_up = {f"{mlp}gate_proj": config.intermediate_size, f"{mlp}up_proj": config.intermediate_size}
        output, down = {f"{attention}o_proj": config.hidden_size}, {f"{mlp}down_proj": config.hidden_size}
        return LayerWeights(
            input_norm=self.norm(f"{prefix}input_layernorm.weight", config.hidden_size),
            qkv=self._linear(f"layers.{index}.qkv", qkv, config.hidden_size, config.attention_bias),
            qk_norm=self._qk_norm(attention),
            attention_output=self._linear(f"layers.{index}.attention_output", output, query, config.attention_output_bias),
            mlp_norm=self.norm(f"{prefix}post_attention_layernorm.weight", config.hidden_size),
            gate_up=self._linear(f"layers.{index}.gate_up", gate_up, config.hidden_size, config.mlp_bias),
            down=self._linear(f"layers.{index}.down", down, config.intermediate_size, config.mlp_bias),
        )

    def require_all_used(self) -> None:
        unexpected = sorted(name for name in self._files.names - self._used if not _IGNORED.fullmatch(name))
        if unexpected:
            shown = ", ".join(unexpected[:3]) + (", …" if len(unexpected) > 3 else "")
            raise ModelFileError(
                f"{self._files.file_of(unexpected[0])}: {len(unexpected)} tensors that {self._config.architecture} with this"
                f" config.json does not have: {shown}"
            )

    def _linear(self, name: str, parts: dict[str, int], num_inputs: int, has_bias: bool) -> Linear:
        """Projections of the same inputs as one layer; `parts` gives the outputs of each, of which the rank has some."""
        own = {part: self._shard.part(num_outputs) for part, num_outputs in parts.items()}
        weights = [self.take(f"{part}.weight", num_outputs, num_inputs)[own[part]] for part, num_outputs in parts.items()]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = None
        if has_bias:
            bias = torch.cat([self.norm(f"{part}.bias", num_outputs)[own[part]] for part, num_outputs in parts.items()])
        return self._formats.convert(name, weight, bias)

    def _qk_norm(self, attention: str) -> torch.Tensor | None:
        config = self._shard.of(self._config)
        if not config.qk_norm:
            return None
        query = self.norm(f"{attention}q_norm.weight", config.head_dim).expand(config.num_heads, -1)
        key = self.norm(f"{attention}k_norm.weight", config.head_dim).expand(config.num_kv_heads, -1)
        return torch.cat([query, key])
