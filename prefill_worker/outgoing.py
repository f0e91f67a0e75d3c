"""Which blocks of a prompt are computed, layer by layer, and which of them were given to the push.

A block goes out once, as soon as its last token is computed and the ticket is there, whichever comes later; so prefill may run
ahead of its ticket, and a layer travels while the next one is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from segue.kv_layout import KVLayout


class BlockSink(Protocol):
    def send(self, layer: int, blocks: Sequence[tuple[int, int]]) -> None:
        """Takes (source block, index among the ticket's destinations) pairs of one layer."""


class OutgoingKV:
    def __init__(self, layout: KVLayout, num_prompt_tokens: int) -> None:
        self._block_size = layout.block_size
        self._num_prompt_tokens = num_prompt_tokens
        self._num_prompt_blocks = layout.num_blocks_for(num_prompt_tokens)
        self._block_ids: Sequence[int] = ()
        self._sink: BlockSink | None = None
        self._first_block = 0
        # Per layer, in blocks from the prompt's start: computed >= sent once a sink is attached.
        self._computed = [0] * layout.num_layers
        self._sent = [0] * layout.num_layers

    def begin(self, block_ids: Sequence[int], num_cached_tokens: int) -> None:
        """Memory was leased; the first `num_cached_tokens` are computed in every layer."""
        self._block_ids = block_ids
        for layer in range(len(self._computed)):
            self.layer_done(layer, num_cached_tokens)

    def attach(self, sink: BlockSink, first_block: int) -> None:
        """The ticket came: blocks before `first_block` are not wanted."""
        self._sink = sink
        self._first_block = first_block
        self._sent = [first_block] * len(self._sent)
        for layer in range(len(self._sent)):
            self._flush(layer)

    def layer_done(self, layer: int, num_tokens: int) -> None:
        """The KV of the prompt's first `num_tokens` tokens is in the cache for `layer`."""
        whole_prompt = num_tokens >= self._num_prompt_tokens
        self._computed[layer] = self._num_prompt_blocks if whole_prompt else num_tokens // self._block_size
        self._flush(layer)

    def _flush(self, layer: int) -> None:
        start, end = self._sent[layer], self._computed[layer]
        if self._sink is None or start >= end:
            return
        self._sink.send(layer, [(self._block_ids[i], i - self._first_block) for i in range(start, end)])
        self._sent[layer] = end
