"""The decoder: one for all architectures, whose differences are fields of ModelConfig and tensors that are there or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine.kernels.base import Kernels
from engine.step import StepInputs
from engine.weights import LayerWeights, ModelWeights


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's linear layers as the backend packed them."""

    qkv: Any
    attention_output: Any
    gate_up: Any
    down: Any
    qk_norm: torch.Tensor | None


class Decoder:
    def __init__(self, weights: ModelWeights, kernels: Kernels[Any, Any]) -> None:
        self.kernels = kernels
        self._embedding = weights.embedding.to(kernels.device)
        self._layers = [_pack_layer(kernels, layer) for layer in weights.layers]
        self._head = kernels.pack(weights.head, norm=weights.final_norm)

    def forward(self, step: StepInputs, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Logits [sampled rows, vocab] float32, on the backend's device. `on_layer` is called as soon as a layer's K and V are
        in the cache."""
        device = self.kernels.device
        return self.compute(self.kernels.prepare(step), step.token_ids.to(device), step.sampled_rows.to(device), on_layer)

    def compute(
        self,
        prepared: Any,
        token_ids: torch.Tensor,
        sampled_rows: torch.Tensor,
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """`forward` without what the host does first: `prepared` comes from the backend, `token_ids` [tokens] and
        `sampled_rows` [sampled] int64 are on its device."""
        kernels = self.kernels
        hidden = self._embedding[token_ids].to(torch.float32)
        for index, layer in enumerate(self._layers):
            heads = kernels.linear(layer.qkv, hidden)
            kernels.rotate_and_write(index, heads, layer.qk_norm, prepared)
            if on_layer is not None:
                on_layer(index)
            attended = kernels.attend(index, heads, prepared)
            kernels.linear(layer.attention_output, attended, add_to=hidden)
            kernels.linear(layer.down, kernels.linear(layer.gate_up, hidden), add_to=hidden)
        return kernels.linear(self._head, hidden[sampled_rows])


def _pack_layer(kernels: Kernels[Any, Any], layer: LayerWeights) -> _Layer:
    return _Layer(
        qkv=kernels.pack(layer.qkv, norm=layer.input_norm),
        attention_output=kernels.pack(layer.attention_output),
        gate_up=kernels.pack(layer.gate_up, norm=layer.mlp_norm),
        down=kernels.pack(layer.down, gated=True),
        qk_norm=None if layer.qk_norm is None else layer.qk_norm.to(kernels.device),
    )
