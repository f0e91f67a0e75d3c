"""Where the time of each attempt went, read from the phases that a sequence went through: pure functions over its history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from segue.lifecycle import TERMINAL, Phase

History = Sequence[tuple[Phase, float]]


@dataclass(frozen=True, slots=True)
class AttemptTiming:
    """Seconds. Reserve and prefill begin together, when the queue ends; the others follow one another. See
    segue.v1.Attempt."""

    # From the first attempt's start.
    start_s: float
    queue_s: float
    reserve_s: float
    prefill_s: float
    exposed_s: float
    decode_s: float


def attempt_timings(history: History, now_s: float) -> list[AttemptTiming]:
    """One for each attempt. `now_s`, on the history's clock, ends the phase that a sequence still is in."""
    begin_s = history[0][1]
    starts = [place for place, (phase, _) in enumerate(history) if phase is Phase.QUEUED]
    ends = [*starts[1:], len(history)]
    # The phase that follows an attempt, the next one's QUEUED or the terminal one, ends it.
    return [_timing(history[start : end + 1], begin_s, now_s) for start, end in zip(starts, ends, strict=True)]


def _timing(history: History, begin_s: float, now_s: float) -> AttemptTiming:
    # The first of each kind: an attempt that failed ends with the QUEUED of the next.
    entered = dict(reversed(history))
    last, last_s = history[-1]
    has_ended = last in TERMINAL or (last is Phase.QUEUED and len(history) > 1)
    end_s = last_s if has_ended else now_s

    def seconds(start: Phase, *following: Phase) -> float:
        """From entering `start` until one of `following` was entered, or the attempt's end."""
        if start not in entered:
            return 0.0
        return next((entered[phase] for phase in following if phase in entered), end_s) - entered[start]

    return AttemptTiming(
        start_s=entered[Phase.QUEUED] - begin_s,
        queue_s=seconds(Phase.QUEUED, Phase.RESERVED),
        # Not known when the ticket came after the first token.
        reserve_s=seconds(Phase.RESERVED, Phase.PREFILLING) if Phase.PREFILLING in entered else 0.0,
        prefill_s=seconds(Phase.RESERVED, Phase.TRANSFERRING),
        exposed_s=seconds(Phase.TRANSFERRING, Phase.DECODING),
        decode_s=seconds(Phase.DECODING),
    )
