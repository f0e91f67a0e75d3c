"""What placement knows of the workers: a row of numbers for each, and the prefix caches of all.

A link owns its row and brings it up to date when something of it changed. So a placement among a thousand workers looks at none
of them by itself, and computes with whole columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, get_type_hints

import numpy as np
from numpy.typing import NDArray

from router.prefix_index import PrefixIndex
from segue.prefix import block_hashes
from segue.v1 import worker_pb2


class WorkerFacts(NamedTuple):
    """One worker now. The fields are the columns of `Fleet.columns`, in this order."""

    # It takes new sequences.
    available: bool
    # Its assignment; both for a colocated worker.
    prefills: bool
    decodes: bool
    # Numbers that stand for names: only workers of equal layouts can exchange KV, those of equal formats compute the same bits.
    layout: int
    formats: int
    host: int
    # For a prompt that it computes it fetches what only the decode worker has.
    pulls_kv: bool
    block_size: int
    # Prompt plus output tokens that fit its KV memory.
    capacity_tokens: int
    # Prompt tokens ahead of a new one.
    queued_tokens: int
    # Sequences that decode here, or will.
    sequences: int
    # Of those of this router, those that have no memory yet.
    unreserved: int
    # KV blocks that are not leased.
    available_blocks: int
    # Measured lately; 0 while nothing was.
    prefill_ms_per_token: float = 0.0
    decode_ms_per_step: float = 0.0
    decode_ms_per_sequence: float = 0.0


# By the name of the fact: [rows].
Columns = Mapping[str, NDArray[Any]]
_COLUMN_TYPES: dict[type, type] = {bool: np.bool_, int: np.int64, float: np.float64}
_FIRST_SIZE = 16


class Member(Protocol):
    """A link, as the fleet sees it."""

    def facts(self) -> WorkerFacts: ...


class Fleet:
    def __init__(self) -> None:
        # One for each member, and some that are not available because nobody has them.
        self.columns: Columns = {
            name: np.zeros(_FIRST_SIZE, _COLUMN_TYPES[kind]) for name, kind in get_type_hints(WorkerFacts).items()
        }
        # By row; None: the row is free.
        self._members: list[Member | None] = [None] * _FIRST_SIZE
        self._numbers: dict[str, int] = {"": 0}
        # How many members have each. They stay as they are for as long as a member is here.
        self._num_of_layout: Counter[int] = Counter()
        self._num_of_block_size: Counter[int] = Counter()
        self._index = PrefixIndex()
        # By row: the number of the last cache events; None until the first snapshot, and after a gap.
        self._heard: dict[int, int | None] = {}
        # Called whenever a row changed.
        self.on_change: Callable[[], None] = lambda: None

    def join(self, member: Member) -> int:
        """Gives the member's row, its own until it leaves."""
        if None not in self._members:
            self.columns = {name: np.append(column, np.zeros_like(column)) for name, column in self.columns.items()}
            self._members += [None] * len(self._members)
        row = self._members.index(None)
        self._members[row] = member
        self._heard[row] = None
        self._count(member, 1)
        self.changed(row)
        return row

    def leave(self, row: int) -> None:
        self._count(self.member(row), -1)
        self._members[row] = None
        for column in self.columns.values():
            column[row] = 0
        self._index.forget(row)

    def _count(self, member: Member, change: int) -> None:
        facts = member.facts()
        for counter, value in ((self._num_of_layout, facts.layout), (self._num_of_block_size, facts.block_size)):
            counter[value] += change
            if not counter[value]:
                del counter[value]

    @property
    def layouts(self) -> list[int]:
        """Those that members have."""
        return list(self._num_of_layout)

    def changed(self, row: int) -> None:
        """The member's facts are not what they were."""
        for column, fact in zip(self.columns.values(), self.member(row).facts(), strict=True):
            column[row] = fact
        self.on_change()

    def number(self, name: str) -> int:
        """Stands for `name` in a column: equal names have equal numbers, no name has 0."""
        return self._numbers.setdefault(name, len(self._numbers))

    def member(self, row: int) -> Member:
        member = self._members[row]
        assert member is not None
        return member

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
        cached = np.zeros(len(self._members), np.int64)
        if self._index.is_empty:
            return cached
        for block_size in self._num_of_block_size:
            # Blocks of other sizes have other hashes: only workers that have this size are found.
            holders = self._index.leading_blocks(block_hashes(token_ids, block_size, salt))
            if holders:
                which, row = np.divmod(np.flatnonzero(_bits(holders, len(cached))), len(cached))
                cached[row] = np.array(list(holders.values()))[which] * block_size
        return cached


def _bits(numbers: Collection[int], count: int) -> NDArray[np.bool_]:
    """The lowest `count` bits of each, the lowest first: [len(numbers), count]."""
    num_bytes = -(-count // 8)
    data = b"".join([number.to_bytes(num_bytes, "little") for number in numbers])
    bits = np.unpackbits(np.frombuffer(data, np.uint8).reshape(-1, num_bytes), axis=1, count=count, bitorder="little")
    return bits.view(np.bool_)
