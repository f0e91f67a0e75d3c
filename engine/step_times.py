"""How long steps take, learned from those that were computed: what a router predicts from."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from engine.step import Chunk
from segue.trend import Trend


class StepTimes:
    """Written on the engine's thread, read on any."""

    def __init__(self) -> None:
        # Milliseconds by tokens, of steps with a chunk of a prompt; by sequences, of the others.
        self.prefill = Trend()
        self.decode = Trend()
        # When the step under way began, on the monotonic clock; None between steps.
        self._began_s: float | None = None

    @property
    def age_s(self) -> float:
        """How long the step that is being computed has taken so far; 0 between steps."""
        began_s = self._began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    @contextmanager
    def of(self, chunks: Sequence[Chunk]) -> Iterator[None]:
        """Around the step that computes `chunks`. One that raises is not learned from."""
        self._began_s = began_s = time.monotonic()
        try:
            yield
            milliseconds = 1000 * (time.monotonic() - began_s)
        finally:
            self._began_s = None
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        if num_tokens > len(chunks):
            self.prefill.add(num_tokens, milliseconds)
        else:
            self.decode.add(len(chunks), milliseconds)
