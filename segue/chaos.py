"""Faults on purpose: what may go wrong, how often, and in which order. Decisions only; kv_transfer/faults.py carries them out.

    seed=1,drop=0.01,corrupt=0.001,delay=5ms,kill=decode@push:3

Two runs with the same line meet the same faults: the n-th frame of a kind that a worker sends has its fate, whatever else
happens around it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Self

from segue.v1 import transfer_pb2 as pb

ROLES = ("prefill", "decode")
FRAMES = tuple(field.name for field in pb.TransferFrame.DESCRIPTOR.oneofs_by_name["message"].fields)
# What becomes of a ticket without a frame, at the worker that gave it out: made, its KV complete, taken over.
STEPS = ("granted", "arrived", "accepted")
_ALLOWED = (
    "seed=NUMBER, drop=PROBABILITY, cut=PROBABILITY, corrupt=PROBABILITY, delay=TIME, kill=ROLE@[after-]EVENT:N, "
    "stop=ROLE@[after-]EVENT:N:TIME"
)
_STRIKE = re.compile(r"(?P<role>\w+)@(?P<after>after-)?(?P<event>\w+):(?P<nth>[1-9]\d*)(?::(?P<pause>\w+(?:\.\w+)?))?")
_SECONDS = {"ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Strike:
    """A worker of `role` ends itself, or stops for `pause_s`, when it takes part in an event for the `nth` time: before it
    sends or handles the frame, or after it did."""

    role: str
    event: str
    nth: int
    after: bool = False
    # None: it is killed.
    pause_s: float | None = None

    def __str__(self) -> str:
        """As it is written in a spec."""
        when = f"{self.role}@{'after-' if self.after else ''}{self.event}:{self.nth}"
        return f"kill={when}" if self.pause_s is None else f"stop={when}:{self.pause_s:g}s"


@dataclass(frozen=True, slots=True)
class ChaosSpec:
    """`drop` and `cut` are probabilities for each frame, `corrupt` for each region."""

    seed: int = 0
    drop: float = 0.0
    cut: float = 0.0
    corrupt: float = 0.0
    # A frame waits a random time, up to this one.
    delay_s: float = 0.0
    strikes: tuple[Strike, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ValueError, which names the part at fault and says what is allowed."""
        values: dict[str, int | float] = {}
        strikes: list[Strike] = []
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, value = part.partition("=")
            field = "delay_s" if name == "delay" else name
            if name in {"kill", "stop"}:
                strikes.append(_parse_strike(part, name, value))
            elif field in values:
                raise ValueError(f"{part!r}: {name} was given before")
            elif name == "seed":
                values[field] = _parse_seed(part, value)
            elif name in {"drop", "cut", "corrupt"}:
                values[field] = _parse_probability(part, value)
            elif name == "delay":
                values[field] = _parse_seconds(part, value)
            else:
                raise ValueError(f"{part!r} is not known; there are: {_ALLOWED}")
        return cls(**values, strikes=tuple(strikes))  # type: ignore[arg-type]  # each field got a value of its type


def check_chaos(text: str) -> str:
    """`text` itself. Raises ValueError when it is no ChaosSpec."""
    ChaosSpec.parse(text)
    return text


@dataclass(frozen=True, slots=True)
class Fate:
    """What happens to one frame: it waits, and then is lost with its connection, or is the connection's last."""

    delay_s: float
    is_dropped: bool
    is_cut: bool


@dataclass(frozen=True, slots=True)
class Strikes:
    """What strikes the worker before, and what after, it sends or handles one frame."""

    before: Strike | None
    after: Strike | None


class Chaos:
    """The faults that one worker meets."""

    def __init__(self, spec: ChaosSpec, worker_id: str, roles: Sequence[str]) -> None:
        self._spec = spec
        self._worker_id = worker_id
        self._strikes = {(strike.event, strike.nth, strike.after): strike for strike in spec.strikes if strike.role in roles}
        self._streams: dict[str, Random] = {}
        self._num_events: Counter[str] = Counter()

    def fate(self, frame: str) -> Fate:
        """Of the next frame of this kind that the worker sends."""
        chance = self._stream(frame)
        spec = self._spec
        return Fate(chance.random() * spec.delay_s, chance.random() < spec.drop, chance.random() < spec.cut)

    def damaged_bit(self, num_bits: int) -> int | None:
        """Which bit of the next region that the worker pushes flips, if any does."""
        chance = self._stream("corrupt")
        return chance.randrange(num_bits) if chance.random() < self._spec.corrupt else None

    def next(self, event: str) -> Strikes:
        """The worker takes part in `event` once more."""
        self._num_events[event] += 1
        nth = self._num_events[event]
        return Strikes(self._strikes.get((event, nth, False)), self._strikes.get((event, nth, True)))

    def _stream(self, kind: str) -> Random:
        """One for each kind, so that how kinds mix, which is a matter of timing, changes no decision."""
        if kind not in self._streams:
            self._streams[kind] = Random(f"{self._spec.seed}/{self._worker_id}/{kind}")
        return self._streams[kind]


def _parse_seed(part: str, value: str) -> int:
    if not re.fullmatch(r"\d+", value):
        raise ValueError(f"{part!r}: {value!r} is no whole number")
    return int(value)


def _parse_probability(part: str, value: str) -> float:
    if not re.fullmatch(r"\d*\.?\d+", value) or float(value) > 1.0:
        raise ValueError(f"{part!r}: {value!r} is no probability; give a number from 0 to 1")
    return float(value)


def _parse_seconds(part: str, value: str) -> float:
    match = re.fullmatch(r"(\d*\.?\d+)(ms|s)", value)
    if match is None:
        raise ValueError(f"{part!r}: {value!r} is no time; give one such as 5ms or 0.2s")
    return float(match[1]) * _SECONDS[match[2]]


def _parse_strike(part: str, name: str, value: str) -> Strike:
    match = _STRIKE.fullmatch(value)
    if match is None or (match["pause"] is None) != (name == "kill"):
        form = "kill=decode@push:3" if name == "kill" else "stop=decode@push:3:2s"
        raise ValueError(f"{part!r} is not understood; write it like {form} or {form.replace('@', '@after-')}")
    if match["role"] not in ROLES:
        raise ValueError(f"{part!r}: there is no role {match['role']!r}; there are: {', '.join(ROLES)}")
    if match["event"] not in (*FRAMES, *STEPS):
        raise ValueError(f"{part!r}: there is no event {match['event']!r}; there are: {', '.join((*FRAMES, *STEPS))}")
    if match["event"] in STEPS and match["after"]:
        raise ValueError(f"{part!r}: {match['event']} is a moment and no frame; write {match['role']}@{match['event']}")
    pause_s = None if name == "kill" else _parse_seconds(part, match["pause"])
    return Strike(match["role"], match["event"], int(match["nth"]), bool(match["after"]), pause_s)
