"""What a worker's transfers came to, since it started."""

from __future__ import annotations

from collections import Counter

from segue.errors import TransferError
from segue.histogram import Histogram
from segue.v1.inference_pb2 import WorkerLoad

# From shared memory to a busy network between hosts.
_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class TransferAccount:
    """One for both services of a worker. Each transfer is told once, where it is sent: `sent` or `failed`; a failure also where
    it should have arrived."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._seconds = Histogram(_BOUNDS_S)
        self._failures: Counter[str] = Counter()

    def sent(self, num_bytes: int, seconds: float) -> None:
        """`seconds` from the first block until the receipt."""
        self._num_bytes += num_bytes
        self._seconds.observe(seconds)

    def failed(self, error: TransferError) -> None:
        self._failures[error.code] += 1

    def add_load(self, load: WorkerLoad) -> None:
        load.transferred_bytes += self._num_bytes
        load.failed_transfers += self._failures.total()
        load.transfer_seconds.CopyFrom(self._seconds.to_pb())
        load.transfer_failures.update(self._failures)
