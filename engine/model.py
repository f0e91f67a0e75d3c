"""The decoder: one for all architectures, whose differences are fields of ModelConfig and tensors that are there or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import embedding, linear, silu

from engine.attention import Attention
from engine.rotary import Rotary, rotate
from engine.step import StepInputs
from engine.weights import LayerWeights, ModelWeights
from segue.models.config import ModelConfig


class Decoder:
    def __init__(self, config: ModelConfig, weights: ModelWeights, attention: Attention) -> None:
        self._config = config
        self._weights = weights
        self._attention = attention
        self._rotary = Rotary(config.rope, config.head_dim)

    def forward(self, step: StepInputs, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Logits [sampled rows, vocab] float32. `on_layer` is called as soon as a layer's K and V are in the cache."""
        weights = self._weights
        hidden = embedding(step.token_ids, weights.embedding)
        cos, signed_sin = self._rotary.tables(step.positions, hidden.dtype)
        for index, layer in enumerate(weights.layers):
            heads = self._heads(layer, hidden, cos, signed_sin)
            query, kv = heads[:, : self._config.num_heads], heads[:, self._config.num_heads :]
            self._attention.write(index, kv, step)
            if on_layer is not None:
                on_layer(index)
            attended = self._attention.attend(index, query, kv, step)
            hidden = hidden + linear(attended, layer.attention_output, layer.attention_output_bias)
            hidden = hidden + self._mlp(layer, hidden)
        sampled = rms_norm(hidden[step.sampled_rows], weights.final_norm, self._config.rms_norm_eps)
        return linear(sampled, weights.head).to(torch.float32)

    def _heads(self, layer: LayerWeights, hidden: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
        """Query, key and value heads of `hidden` [tokens, hidden_size]: [tokens, num_heads + 2 * num_kv_heads, head_dim]."""
        config = self._config
        normed = rms_norm(hidden, layer.input_norm, config.rms_norm_eps)
        heads = linear(normed, layer.qkv, layer.qkv_bias).view(len(hidden), -1, config.head_dim)
        rotated = heads[:, : config.num_heads + config.num_kv_heads]
        if layer.qk_norm is not None:
            rotated.copy_(rms_norm(rotated, layer.qk_norm, config.rms_norm_eps))
        rotate(rotated, cos, signed_sin)
        return heads

    def _mlp(self, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden_size] → [tokens, hidden_size]"""
        normed = rms_norm(hidden, layer.mlp_norm, self._config.rms_norm_eps)
        gate, up = linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
        return linear(silu(gate).mul_(up), layer.down, layer.down_bias)


def rms_norm(values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scales the last dimension to a root mean square of 1, in float32, then multiplies by `weight` in the values' dtype."""
    exact = values.to(torch.float32)
    scale = torch.rsqrt(exact.square().mean(-1, keepdim=True).add_(eps))
    return (exact * scale).to(values.dtype).mul_(weight)
