"""The life of a sequence, owned by the router. Its timestamps are the metrics.

    QUEUED → RESERVED → PREFILLING → TRANSFERRING → DECODING → FINISHED
    RESERVED…DECODING → QUEUED      a worker was lost or a hand-over failed: a new attempt, on other workers

RESERVED means that both legs were dispatched; PREFILLING that decode granted its ticket; TRANSFERRING that the first token
is out and decode has not yet acknowledged the KV cache. A sequence whose first token is its last goes to FINISHED from there.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field


class Phase(enum.Enum):
    QUEUED = "queued"
    RESERVED = "reserved"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


_FORWARD = {
    Phase.QUEUED: {Phase.RESERVED},
    # Prefill may give its first token before decode has room for a ticket.
    Phase.RESERVED: {Phase.PREFILLING, Phase.TRANSFERRING},
    Phase.PREFILLING: {Phase.TRANSFERRING},
    Phase.TRANSFERRING: {Phase.DECODING, Phase.FINISHED},
    Phase.DECODING: {Phase.FINISHED},
}
TERMINAL = frozenset({Phase.FINISHED, Phase.FAILED, Phase.CANCELLED})
TRANSITIONS = {phase: nexts | {Phase.FAILED, Phase.CANCELLED} for phase, nexts in _FORWARD.items()} | {
    phase: set() for phase in TERMINAL
}
for _phase in _FORWARD.keys() - {Phase.QUEUED}:
    TRANSITIONS[_phase].add(Phase.QUEUED)


@dataclass(slots=True)
class Lifecycle:
    """Where a sequence stands, and when it got there. Ends in exactly one terminal phase."""

    clock: Callable[[], float] = time.monotonic
    phase: Phase = Phase.QUEUED
    # Every phase in the order of entering, with the seconds on `clock`; a new attempt begins with QUEUED.
    history: list[tuple[Phase, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history.append((self.phase, self.clock()))

    @property
    def is_over(self) -> bool:
        return self.phase in TERMINAL

    def enter(self, phase: Phase) -> None:
        """Raises ValueError for a transition that the table does not have: a defect, never a client's doing."""
        if phase not in TRANSITIONS[self.phase]:
            raise ValueError(f"no transition from {self.phase.value} to {phase.value}")
        self.phase = phase
        self.history.append((phase, self.clock()))

    def seconds(self, start: Phase, end: Phase) -> float | None:
        """Time from first entering `start` to first entering `end`, further attempts included: what the client felt. None
        unless both were entered."""
        start_s, end_s = self._first_s(start), self._first_s(end)
        return None if start_s is None or end_s is None else end_s - start_s

    def _first_s(self, phase: Phase) -> float | None:
        return next((entered_s for entered, entered_s in self.history if entered is phase), None)
