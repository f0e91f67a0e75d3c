"""What was measured lately, kept in slots of time: it never grows beyond them, and is forgotten slot by slot."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from segue.v1 import inference_pb2, operator_pb2

_LATENCY_SLOT_S, _NUM_LATENCY_SLOTS = 5.0, 60
_TRANSFER_SLOT_S, _NUM_TRANSFER_SLOTS = 1.0, 10
# From one bucket of durations to the next.
_LOG_GROWTH = math.log(1.05)
_SHORTEST_S = 1e-6

Key = TypeVar("Key")


class Slots(Generic[Key]):
    """Counts by key for each of the latest `num_slots` slots of `slot_s` seconds on `clock`; the newest has just begun."""

    def __init__(self, slot_s: float, num_slots: int, clock: Callable[[], float]) -> None:
        self.slot_s = slot_s
        self.num_slots = num_slots
        self._clock = clock
        # (number, counts), the newest last; slots in which nothing was counted have no place.
        self._slots: deque[tuple[int, Counter[Key]]] = deque(maxlen=num_slots)

    def count(self, key: Key, number: int) -> None:
        now = int(self._clock() / self.slot_s)
        if not self._slots or self._slots[-1][0] != now:
            self._slots.append((now, Counter()))
        self._slots[-1][1][key] += number

    def aged(self) -> Iterator[tuple[float, Counter[Key]]]:
        """(seconds since its begin, counts) of each slot, the oldest first."""
        now_s = self._clock()
        first = int(now_s / self.slot_s) - self.num_slots + 1
        return ((now_s - number * self.slot_s, counts) for number, counts in self._slots if number >= first)

    def total(self) -> Counter[Key]:
        total = Counter[Key]()
        for _, counts in self.aged():
            total.update(counts)
        return total


class RecentLatency:
    """Durations of the latest five minutes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        # Keys are logarithms of durations, in steps of 5 %.
        self._slots = Slots[int](_LATENCY_SLOT_S, _NUM_LATENCY_SLOTS, clock)

    def add(self, seconds: float, times: int = 1) -> None:
        self._slots.count(round(math.log(max(seconds, _SHORTEST_S)) / _LOG_GROWTH), times)

    def to_pb(self) -> operator_pb2.Latency:
        total = self._slots.total()
        points = [
            operator_pb2.LatencyPoint(
                age_s=age_s, count=counts.total(), p50_s=_percentile(counts, 0.5), p99_s=_percentile(counts, 0.99)
            )
            for age_s, counts in self._slots.aged()
        ]
        return operator_pb2.Latency(
            count=total.total(),
            p50_s=_percentile(total, 0.5),
            p99_s=_percentile(total, 0.99),
            point_s=_LATENCY_SLOT_S,
            points=points,
        )


class RecentTransfers:
    """KV bytes that went from worker to worker in the latest ten seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._slots = Slots[tuple[str, str]](_TRANSFER_SLOT_S, _NUM_TRANSFER_SLOTS, clock)

    def add(self, prefill_worker: str, decode_worker: str, num_bytes: int) -> None:
        self._slots.count((prefill_worker, decode_worker), num_bytes)

    def to_pb(self) -> list[inference_pb2.TransferRate]:
        window_s = _TRANSFER_SLOT_S * _NUM_TRANSFER_SLOTS
        return [
            inference_pb2.TransferRate(prefill_worker=prefill, decode_worker=decode, bytes_per_s=num_bytes / window_s)
            for (prefill, decode), num_bytes in sorted(self._slots.total().items())
            if num_bytes
        ]


def _percentile(counts: Counter[int], share: float) -> float:
    """The shortest duration that so large a share does not exceed; 0 of none."""
    rank = math.ceil(share * counts.total())
    for bucket in sorted(counts):
        rank -= counts[bucket]
        if rank <= 0:
            return math.exp(bucket * _LOG_GROWTH)
    return 0.0
