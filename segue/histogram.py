"""Counts observations by size, as a Prometheus histogram does."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from segue.v1 import inference_pb2 as pb


class Histogram:
    """`bounds`, ascending, are the upper bounds of the buckets; one more bucket takes what is above all of them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def to_pb(self) -> pb.Histogram:
        return pb.Histogram(bounds=self._bounds, counts=self._counts, sum=self._sum)
