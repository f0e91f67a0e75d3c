"""What placement knows of the workers: a row of numbers for each, and the prefix caches of all.

A link owns its row and says when something of it changed; the rows are brought up to date when somebody looks. So a placement
among a thousand workers touches the few that changed, and computes with whole columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from router.prefix_index import PrefixIndex
from segue.prefix import block_hashes
from segue.v1 import worker_pb2


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """One worker now. The fields are the columns of `Fleet.rows`, in this order."""

    # It takes new sequences.
    available: bool
    # Its assignment; both for a colocated worker.
    prefills: bool
    decodes: bool
    # Numbers that stand for names: only workers of equal layouts can exchange KV, those of equal formats compute the same bits.
    layout: int
    formats: int
    host: int
    block_size: int
    # Prompt plus output tokens that fit its KV memory.
    capacity_tokens: int
    # Prompt tokens ahead of a new one.
    queued_tokens: int
    # Sequences that decode here, or will.
    sequences: int
    # KV blocks that are not leased.
    available_blocks: int
    # Measured lately; 0 while nothing was.
    prefill_ms_per_token: float = 0.0
    decode_ms_per_step: float = 0.0
    decode_ms_per_sequence: float = 0.0


Rows = NDArray[np.void]
_COLUMN_TYPES = {"bool": np.bool_, "int": np.int64, "float": np.float64}
_ROW = np.dtype([(name, _COLUMN_TYPES[str(field.type)]) for name, field in WorkerFacts.__dataclass_fields__.items()])


class Member(Protocol):
    """A link, as the fleet sees it."""

    def facts(self) -> WorkerFacts: ...


class Fleet:
    def __init__(self) -> None:
        self._rows: Rows = np.zeros(16, _ROW)
        # By row; None: the row is free.
        self._members: list[Member | None] = [None] * 16
        self._stale: set[int] = set()
        self._numbers: dict[str, int] = {"": 0}
        self._index = PrefixIndex()
        # By row: the number of the last cache events; None until the first snapshot, and after a gap.
        self._heard: dict[int, int | None] = {}

    def join(self, member: Member) -> int:
        """Gives the member's row, its own until it leaves."""
        if None not in self._members:
            self._rows = np.concatenate([self._rows, np.zeros(len(self._rows), _ROW)])
            self._members += [None] * len(self._members)
        row = self._members.index(None)
        self._members[row] = member
        self._heard[row] = None
        self._stale.add(row)
        return row

    def leave(self, row: int) -> None:
        self._members[row] = None
        self._rows[row] = np.zeros((), _ROW)
        self._stale.discard(row)
        self._index.forget(row)

    def changed(self, row: int) -> None:
        """The member's facts are not what they were."""
        self._stale.add(row)

    def number(self, name: str) -> int:
        """Stands for `name` in a column: equal names have equal numbers, no name has 0."""
        return self._numbers.setdefault(name, len(self._numbers))

    def member(self, row: int) -> Member:
        member = self._members[row]
        assert member is not None
        return member

    def rows(self) -> Rows:
        """One for each member, and some that are not available because nobody has them."""
        for row in self._stale:
            self._rows[row] = astuple(self.member(row).facts())
        self._stale.clear()
        return self._rows

    def hear_cache(self, row: int, events: worker_pb2.CacheEvents) -> None:
        """Follows the worker's prefix cache. After a gap nothing is known of it until the next snapshot."""
        heard = self._heard[row]
        if not events.snapshot and (heard is None or events.number != heard + 1):
            if heard is not None:
                self._index.forget(row)
            self._heard[row] = None
            return
        if events.snapshot:
            self._index.forget(row)
        self._heard[row] = events.number
        self._index.remove(row, events.evicted)
        self._index.add(row, events.stored)

    def cached_tokens(self, token_ids: Sequence[int], salt: bytes) -> NDArray[np.int64]:
        """By row: how many leading tokens have their KV in the worker's prefix cache."""
        rows = self.rows()
        cached = np.zeros(len(rows), np.int64)
        if self._index.is_empty:
            return cached
        for block_size in np.unique(rows["block_size"][rows["available"]]).tolist():
            for workers, num_blocks in self._index.leading_blocks(block_hashes(token_ids, block_size, salt)).items():
                held = _bits(workers, len(rows)) & (rows["block_size"] == block_size)
                cached[held] = num_blocks * block_size
        return cached


def _bits(number: int, count: int) -> NDArray[np.bool_]:
    """The lowest `count` bits, the lowest first."""
    data = np.frombuffer(number.to_bytes(-(-count // 8), "little"), np.uint8)
    bits: NDArray[Any] = np.unpackbits(data, count=count, bitorder="little")
    return bits.astype(np.bool_)
