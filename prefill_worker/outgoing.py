"""Which blocks of a prompt are computed, layer by layer, and which of them were given to the push.

A block goes out once, as soon as its last token is computed and the ticket is there, whichever comes later; so prefill may run
ahead of its ticket, and a layer travels while the next one is computed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol


class BlockSink(Protocol):
    @property
    def wanted(self) -> range:
        """The prompt's blocks that it takes: all from some block on."""

    @property
    def block_size(self) -> int:
        """Tokens in one block as the sink counts them."""

    def send(self, layer: int, source_blocks: Sequence[int], blocks: range) -> None:
        """Takes `blocks` of a prompt that lies in `source_blocks`."""


class OutgoingKV:
    def __init__(self, num_layers: int, num_initial_tokens: int) -> None:
        self._num_initial_tokens = num_initial_tokens
        self._source_blocks: Sequence[int] = ()
        self._sink: BlockSink | None = None
        # Per layer: tokens from the prompt's start; the sink's blocks that it was given.
        self._computed = [0] * num_layers
        self._sent = [0] * num_layers
        # When the first block went out, on the monotonic clock.
        self.first_sent_s: float | None = None

    def begin(self, block_ids: Sequence[int], num_tokens: int) -> None:
        """The prompt lies in `block_ids`; the KV of its first `num_tokens` tokens is there in every layer."""
        self._source_blocks = block_ids
        for layer in range(len(self._computed)):
            self.layer_done(layer, num_tokens)

    def attach(self, sink: BlockSink) -> None:
        """The ticket came."""
        self._sink = sink
        self._sent = [sink.wanted.start] * len(self._sent)
        for layer in range(len(self._sent)):
            self._flush(layer)

    def layer_done(self, layer: int, num_tokens: int) -> None:
        """The KV of the prompt's first `num_tokens` tokens is in the cache for `layer`."""
        self._computed[layer] = num_tokens
        self._flush(layer)

    def _flush(self, layer: int) -> None:
        if self._sink is None:
            return
        start, num_tokens = self._sent[layer], self._computed[layer]
        # The prompt's last block goes out although it may not be full.
        whole_prompt = num_tokens >= self._num_initial_tokens
        end = -(-num_tokens // self._sink.block_size) if whole_prompt else num_tokens // self._sink.block_size
        if start < end:
            self.first_sent_s = self.first_sent_s or time.monotonic()
            self._sink.send(layer, self._source_blocks, range(start, end))
            self._sent[layer] = end
