"""Attention over the paged KV cache: the interface, and a backend of plain torch operations."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from engine.kv_cache import KVCache
from engine.step import DecodeGroup, PrefillChunk, StepInputs
from segue.models.config import ModelConfig


class Attention(Protocol):
    def write(self, layer: int, kv: torch.Tensor, step: StepInputs) -> None:
        """Puts the step's K and V [tokens, 2 * num_kv_heads, head_dim] (K heads first) into the layer's cache."""

    def attend(self, layer: int, query: torch.Tensor, kv: torch.Tensor, step: StepInputs) -> torch.Tensor:
        """Each token of `query` [tokens, num_heads, head_dim] attends to its context, which `write` has completed.

        `kv` is what was written. Returns [tokens, num_heads * head_dim].
        """


class TorchAttention:
    """Gathers each context into contiguous memory, then uses torch's fused attention."""

    def __init__(self, config: ModelConfig, cache: KVCache) -> None:
        self._num_kv_heads = config.num_kv_heads
        self._group_size = config.num_heads // config.num_kv_heads
        self._head_dim = config.head_dim
        self._cache = cache

    def write(self, layer: int, kv: torch.Tensor, step: StepInputs) -> None:
        self._cache.slots[layer].index_copy_(0, step.slots, kv.reshape(-1, self._head_dim))

    def attend(self, layer: int, query: torch.Tensor, kv: torch.Tensor, step: StepInputs) -> torch.Tensor:
        parts = [self._decode(layer, query, group) for group in step.decode_groups]
        parts += [self._prefill(layer, query, kv, chunk) for chunk in step.prefill_chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, layer: int, query: torch.Tensor, group: DecodeGroup) -> torch.Tensor:
        """[num_rows, num_heads * head_dim]. The query heads that share a K head become the rows of one small matrix."""
        rows = query[group.first_row : group.first_row + group.num_rows]
        folded = rows.view(group.num_rows, self._num_kv_heads, self._group_size, self._head_dim)
        keys, values = self._gather(layer, group.slabs, group.num_rows, group.num_positions)
        output = scaled_dot_product_attention(folded, keys, values, attn_mask=group.mask)
        return output.reshape(group.num_rows, -1)

    def _prefill(self, layer: int, query: torch.Tensor, kv: torch.Tensor, chunk: PrefillChunk) -> torch.Tensor:
        """[num_rows, num_heads * head_dim]"""
        rows = slice(chunk.first_row, chunk.first_row + chunk.num_rows)
        if chunk.slabs is None:
            keys, values = kv[rows].view(chunk.num_rows, 2, self._num_kv_heads, self._head_dim).permute(1, 2, 0, 3)[:, None]
        else:
            keys, values = self._gather(layer, chunk.slabs, 1, chunk.num_positions)
        output = scaled_dot_product_attention(
            query[rows].transpose(0, 1)[None],
            keys,
            values,
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            enable_gqa=self._group_size > 1,
        )
        return output[0].transpose(0, 1).reshape(chunk.num_rows, -1)

    def _gather(
        self, layer: int, slabs: torch.Tensor, num_contexts: int, num_positions: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each [num_contexts, num_kv_heads, num_positions, head_dim]."""
        gathered = self._cache.slabs[layer].index_select(0, slabs)
        keys, values = gathered.view(2, num_contexts, self._num_kv_heads, -1, self._head_dim)[..., :num_positions, :]
        return keys, values
