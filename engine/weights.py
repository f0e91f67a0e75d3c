"""A model's weights, read from safetensors and laid out for the decoder: q, k, v in one matrix, gate and up in another.

Matrices are [outputs, inputs]. What need not be joined or converted stays a view of the mapped file, which workers on one
host share.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.tensor_files import TensorFiles
from segue.errors import ModelFileError
from segue.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerWeights:
    input_norm: torch.Tensor
    # [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    # Repeated for each head: q's norm for the first num_heads, k's for the next num_kv_heads. [heads, head_dim]
    qk_norm: torch.Tensor | None
    # [hidden_size, num_heads * head_dim]
    attention_output: torch.Tensor
    attention_output_bias: torch.Tensor | None
    mlp_norm: torch.Tensor
    # [2 * intermediate_size, hidden_size]
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    # [hidden_size, intermediate_size]
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    # [vocab_size, hidden_size]; the same tensor twice when the model ties them.
    embedding: torch.Tensor
    head: torch.Tensor
    final_norm: torch.Tensor
    layers: list[LayerWeights]


def load_weights(model_dir: Path, config: ModelConfig, dtype: torch.dtype) -> ModelWeights:
    """Raises ModelFileError, naming tensor and file, for tensors that are missing, unexpected or of another shape."""
    reader = _Reader(TensorFiles(model_dir), config, dtype)
    embedding = reader.take("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    layers = [reader.layer(f"model.layers.{index}.") for index in range(config.num_layers)]
    final_norm = reader.take("model.norm.weight", config.hidden_size)
    head = embedding if config.tie_embeddings else reader.take("lm_head.weight", config.vocab_size, config.hidden_size)
    reader.require_all_used()
    return ModelWeights(embedding, head, final_norm, layers)


# Written by some exporters: derived from the configuration, or a second copy of a tied matrix.
_IGNORED = re.compile(r"lm_head\.weight|.*\.rotary_emb\.inv_freq")


class _Reader:
    def __init__(self, files: TensorFiles, config: ModelConfig, dtype: torch.dtype) -> None:
        self._files = files
        self._config = config
        self._dtype = dtype
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
        return tensor.to(self._dtype)

    def layer(self, prefix: str) -> LayerWeights:
        config = self._config
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        query, key_value = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv = {f"{attention}q_proj": query, f"{attention}k_proj": key_value, f"{attention}v_proj": key_value}
        gate_up = {f"{mlp}gate_proj": config.intermediate_size, f"{mlp}up_proj": config.intermediate_size}
        output, down = {f"{attention}o_proj": config.hidden_size}, {f"{mlp}down_proj": config.hidden_size}
        return LayerWeights(
            input_norm=self.take(f"{prefix}input_layernorm.weight", config.hidden_size),
            qkv=self._joined(qkv, config.hidden_size),
            qkv_bias=self._biases(qkv, config.attention_bias),
            qk_norm=self._qk_norm(attention),
            attention_output=self._joined(output, query),
            attention_output_bias=self._biases(output, config.attention_output_bias),
            mlp_norm=self.take(f"{prefix}post_attention_layernorm.weight", config.hidden_size),
            gate_up=self._joined(gate_up, config.hidden_size),
            gate_up_bias=self._biases(gate_up, config.mlp_bias),
            down=self._joined(down, config.intermediate_size),
            down_bias=self._biases(down, config.mlp_bias),
        )

    def require_all_used(self) -> None:
        unexpected = sorted(name for name in self._files.names - self._used if not _IGNORED.fullmatch(name))
        if unexpected:
            shown = ", ".join(unexpected[:3]) + (", …" if len(unexpected) > 3 else "")
            raise ModelFileError(
                f"{self._files.file_of(unexpected[0])}: {len(unexpected)} tensors that {self._config.architecture} with this"
                f" config.json does not have: {shown}"
            )

    def _joined(self, parts: dict[str, int], num_inputs: int) -> torch.Tensor:
        tensors = [self.take(f"{name}.weight", num_outputs, num_inputs) for name, num_outputs in parts.items()]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def _biases(self, parts: dict[str, int], are_there: bool) -> torch.Tensor | None:
        if not are_there:
            return None
        return torch.cat([self.take(f"{name}.bias", num_outputs) for name, num_outputs in parts.items()])

    def _qk_norm(self, attention: str) -> torch.Tensor | None:
        config = self._config
        if not config.qk_norm:
            return None
        query = self.take(f"{attention}q_norm.weight", config.head_dim).expand(config.num_heads, -1)
        key = self.take(f"{attention}k_norm.weight", config.head_dim).expand(config.num_kv_heads, -1)
        return torch.cat([query, key])
