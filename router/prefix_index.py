"""Which worker holds which block: the cluster's prefix caches as their workers tell of them.

A table of block hashes, open addressing with linear probing, in two numpy arrays: 12 bytes for a slot, three of five slots in
use at most. A slot names a *set* of workers by its number; equal sets have one number, and a set is one Python integer, bit i
for worker i. So a block that is held by many costs no more than one that is held by one, and a prompt is looked up as a whole.
A set that no slot names any more gives its number back: there are as many sets as kinds of holders, whatever came and went.

Hashes are cut to 64 bits. Two that collide make the index wrong about a block; the workers compare all bits, so that costs time
and never a wrong token.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from segue.prefix import HASH_BYTES

Keys = NDArray[np.uint64]
Slots = NDArray[np.int64]

_FIRST_SIZE = 2**12
_MAX_FILL = 0.6
_EMPTY_KEY = np.uint64(0)
_NOBODY = 0


def keys_of(hashes: bytes) -> Keys:
    """Joined hashes of HASH_BYTES each, as keys."""
    keys = np.frombuffer(hashes, np.uint64).reshape(-1, HASH_BYTES // 8)[:, 0]
    return np.where(keys == _EMPTY_KEY, np.uint64(1), keys)


class PrefixIndex:
    """Workers are small integers; bit by bit of a Python integer, so any number of them."""

    def __init__(self) -> None:
        self._keys: Keys = np.zeros(_FIRST_SIZE, np.uint64)
        self._holders: NDArray[np.uint32] = np.zeros(_FIRST_SIZE, np.uint32)
        # Slots with a key, also where nobody holds the block any more.
        self._num_used = 0
        # By number: the set, and how many slots name it; for the empty set nobody counts.
        self._sets: list[int] = [0]
        self._num_slots: list[int] = [0]
        # Invariant: _numbers[s] == n exactly when _sets[n] == s and n is not in _unused.
        self._numbers: dict[int, int] = {0: _NOBODY}
        self._unused: list[int] = []

    def __len__(self) -> int:
        """Blocks that anybody holds."""
        return int(np.count_nonzero(self._holders))

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever added."""
        return not self._num_used

    @property
    def num_bytes(self) -> int:
        """Memory of the table and of the sets."""
        sets = sum(map(sys.getsizeof, (self._sets, self._num_slots, self._numbers, *self._sets)))
        return self._keys.nbytes + self._holders.nbytes + sets

    def add(self, worker: int, hashes: bytes) -> None:
        keys = np.unique(keys_of(hashes))
        self._reserve(len(keys))
        self._change(self._insert(keys), add=1 << worker)

    def remove(self, worker: int, hashes: bytes) -> None:
        slots = self._find(keys_of(hashes))
        self._change(np.unique(slots[slots >= 0]), remove=1 << worker)

    def forget(self, worker: int) -> None:
        """Removes all that the worker holds."""
        numbers = [number for workers, number in self._numbers.items() if workers >> worker & 1]
        if not numbers:
            return
        moved = np.arange(len(self._sets), dtype=np.uint32)
        for number in numbers:
            moved[number] = self._move(number, self._num_slots[number], self._sets[number] & ~(1 << worker))
        self._holders = moved[self._holders]

    def leading_blocks(self, hashes: Sequence[bytes]) -> dict[int, int]:
        """How many of a prompt's leading blocks workers hold, for each set of workers (bit i for worker i) that hold equally
        many; those that hold none are in no set."""
        if not hashes:
            return {}
        slots = self._find(keys_of(b"".join(hashes)))
        numbers = np.where(slots >= 0, self._holders[slots], _NOBODY)
        (changes,) = np.nonzero(numbers[1:] != numbers[:-1])
        depths: dict[int, int] = {}
        holders = self._sets[numbers[0]]
        for start in (changes + 1).tolist():
            still = holders & self._sets[numbers[start]]
            if lost := holders & ~still:
                depths[lost] = start
            holders = still
            if not holders:
                return depths
        if holders:
            depths[holders] = len(hashes)
        return depths

    def _change(self, slots: Slots, *, add: int = 0, remove: int = 0) -> None:
        """In each slot, of which none is named twice."""
        numbers, which, counts = np.unique(self._holders[slots], return_inverse=True, return_counts=True)
        moved = [
            self._move(number, count, (self._sets[number] | add) & ~remove)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)
        ]
        self._holders[slots] = np.array(moved, np.uint32)[which]

    def _move(self, number: int, num_slots: int, workers: int) -> int:
        """So many slots will name the set `workers` instead of `number`. Gives the number of that set."""
        other = self._numbers.get(workers)
        if other is None:
            other = self._new_set(workers)
        self._num_slots[other] += num_slots
        self._num_slots[number] -= num_slots
        if number != _NOBODY and not self._num_slots[number]:
            del self._numbers[self._sets[number]]
            self._unused.append(number)
        return other

    def _new_set(self, workers: int) -> int:
        if self._unused:
            number = self._unused.pop()
            self._sets[number] = workers
        else:
            number = len(self._sets)
            self._sets.append(workers)
            self._num_slots.append(0)
        self._numbers[workers] = number
        return number

    def _home(self, keys: Keys) -> Slots:
        # The highest bits of a cryptographic hash, as good as any: so the table is almost in the order of its keys.
        return (keys >> np.uint64(65 - len(self._keys).bit_length())).astype(np.int64)

    def _find(self, keys: Keys) -> Slots:
        """The slot of each key; -1 where there is none."""
        mask = len(self._keys) - 1
        slots = self._home(keys)
        found = self._keys[slots]
        searching = np.flatnonzero((found != keys) & (found != _EMPTY_KEY))
        while searching.size:
            slots[searching] = (slots[searching] + 1) & mask
            found = self._keys[slots[searching]]
            searching = searching[(found != keys[searching]) & (found != _EMPTY_KEY)]
        slots[self._keys[slots] != keys] = -1
        return slots

    def _insert(self, keys: Keys) -> Slots:
        """The slots of keys of which none is there twice; those that are new get one."""
        mask = len(self._keys) - 1
        slots = self._home(keys)
        waiting = np.arange(len(keys))
        while waiting.size:
            found = self._keys[slots[waiting]]
            free = waiting[found == _EMPTY_KEY]
            # Of several that want one slot the first gets it; the others find it taken.
            winners = free[np.unique(slots[free], return_index=True)[1]]
            self._keys[slots[winners]] = keys[winners]
            self._num_used += len(winners)
            waiting = waiting[self._keys[slots[waiting]] != keys[waiting]]
            slots[waiting] = (slots[waiting] + 1) & mask
        return slots

    def _reserve(self, num_new: int) -> None:
        """Makes room for that many keys, and lets go of those that nobody holds."""
        if self._num_used + num_new <= _MAX_FILL * len(self._keys):
            return
        held = np.flatnonzero(self._holders)
        keys, holders = self._keys[held], self._holders[held]
        size = _FIRST_SIZE
        while len(keys) + num_new > _MAX_FILL * size / 1.5:
            size *= 2
        self._keys = np.zeros(size, np.uint64)
        self._holders = np.zeros(size, np.uint32)
        self._fill(keys, holders)

    def _fill(self, keys: Keys, holders: NDArray[np.uint32]) -> None:
        """Puts them into the empty table, in the order of keys: each into its home, or behind the one before."""
        # They come almost in order, which makes this sort a fast one.
        order = np.argsort(keys, kind="stable")
        keys, holders = keys[order], holders[order]
        places = np.arange(len(keys))
        slots = np.maximum.accumulate(self._home(keys) - places) + places
        num_fitting = int(np.searchsorted(slots, len(self._keys)))
        self._keys[slots[:num_fitting]] = keys[:num_fitting]
        self._holders[slots[:num_fitting]] = holders[:num_fitting]
        self._num_used = num_fitting
        # The last few go on at the table's beginning.
        self._holders[self._insert(keys[num_fitting:])] = holders[num_fitting:]
