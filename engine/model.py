"""The decoder: one for all architectures, whose differences are fields of ModelConfig and tensors that are there or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from engine.kernels.base import DecoderLayer, Kernels, LayerKernels
from engine.parallel import RankGroup
from engine.step import StepInputs
from engine.weights import LayerWeights, ModelWeights


class Decoder:
    """With `group`, the decoder of one of its ranks: `weights` and `kernels` are of the rank's share, and all ranks compute the
    same steps at the same time."""

    def __init__(self, weights: ModelWeights, kernels: Kernels[Any, Any], group: RankGroup | None = None) -> None:
        self.kernels = kernels
        self._group = group
        self._embedding = weights.embedding.to(kernels.device)
        self._layers = tuple(_pack_layer(kernels, layer) for layer in weights.layers)
        # All layers in one call, where the backend can do that.
        self._run_at_once: Callable[[torch.Tensor, Any], None] | None = None
        if group is None and isinstance(kernels, LayerKernels):
            self._run_at_once = partial(kernels.run_layers, kernels.join_layers(self._layers))
        self._head = kernels.pack(weights.head, norm=weights.final_norm)

    def forward(self, step: StepInputs, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Logits [sampled rows, vocab] float32, on the backend's device. `on_layer` is called as soon as a layer's K and V are
        in the cache; with a group, in the cache of every rank."""
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
        if self._run_at_once is not None and on_layer is None:
            self._run_at_once(hidden, prepared)
        else:
            hidden = self._run_layers(hidden, prepared, on_layer)
        logits = kernels.linear(self._head, hidden[sampled_rows])
        return logits if self._group is None else self._group.join(logits, len(self._embedding))

    def _run_layers(self, hidden: torch.Tensor, prepared: Any, on_layer: Callable[[int], None] | None) -> torch.Tensor:
        kernels = self.kernels
        for index, layer in enumerate(self._layers):
            heads = kernels.linear(layer.qkv, hidden)
            kernels.rotate_and_write(index, heads, layer.qk_norm, prepared)
            if on_layer is not None and self._group is None:
                on_layer(index)
            hidden = self._add(layer.attention_output, kernels.attend(index, heads, prepared), hidden)
            if on_layer is not None and self._group is not None:
                # Every rank has brought what it attended to, and so has written before.
                on_layer(index)
            hidden = self._add(layer.down, kernels.linear(layer.gate_up, hidden), hidden, num_parts=2)
        return hidden

    def _add(self, layer: Any, inputs: torch.Tensor, hidden: torch.Tensor, num_parts: int = 1) -> torch.Tensor:
        """`hidden` with the layer's results added. Of several ranks each brings some of the `inputs` (of `num_parts` that lie
        one beside the other: gate and value), and of the results."""
        if self._group is None:
            return self.kernels.linear(layer, inputs, add_to=hidden)
        inputs = self._group.join(inputs, self._group.shard.size * inputs.shape[1], num_parts)
        own = hidden[:, self._group.shard.part(hidden.shape[1])].contiguous()
        return self._group.join(self.kernels.linear(layer, inputs, add_to=own), hidden.shape[1])


def _pack_layer(kernels: Kernels[Any, Any], layer: LayerWeights) -> DecoderLayer[Any]:
    return DecoderLayer(
        qkv=kernels.pack(layer.qkv, norm=layer.input_norm),
        attention_output=kernels.pack(layer.attention_output),
        gate_up=kernels.pack(layer.gate_up, norm=layer.mlp_norm),
        down=kernels.pack(layer.down, gated=True),
        qk_norm=None if layer.qk_norm is None else layer.qk_norm.to(kernels.device),
    )
