"""The index against one that is a dictionary of sets."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router import prefix_index
from router.prefix_index import PrefixIndex


def block(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def joined(numbers: list[int]) -> bytes:
    return b"".join(map(block, numbers))


workers = st.integers(0, 130)
blocks = st.lists(st.integers(0, 60), max_size=30)


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.holders: defaultdict[int, set[int]] = defaultdict(set)

    @rule(worker=workers, numbers=blocks)
    def add(self, worker: int, numbers: list[int]) -> None:
        self.index.add(worker, joined(numbers))
        for number in numbers:
            self.holders[number].add(worker)

    @rule(worker=workers, numbers=blocks)
    def remove(self, worker: int, numbers: list[int]) -> None:
        self.index.remove(worker, joined(numbers))
        for number in numbers:
            self.holders[number].discard(worker)

    @rule(worker=workers)
    def forget(self, worker: int) -> None:
        self.index.forget(worker)
        for held in self.holders.values():
            held.discard(worker)

    @rule(prompt=blocks)
    def look_up(self, prompt: list[int]) -> None:
        expected = {}
        for worker in range(131):
            depth = next((i for i, number in enumerate(prompt) if worker not in self.holders[number]), len(prompt))
            if depth:
                expected[worker] = depth
        found = self.index.leading_blocks([block(number) for number in prompt])
        assert {worker: depth for held, depth in found.items() for worker in range(131) if held >> worker & 1} == expected

    @invariant()
    def counts(self) -> None:
        assert len(self.index) == sum(bool(held) for held in self.holders.values())

    @invariant()
    def keeps_no_set_that_nothing_names(self) -> None:
        kinds = {frozenset(held) for held in self.holders.values()} | {frozenset()}
        assert len(self.index._numbers) == len(kinds)
        assert len(self.index._sets) == len(kinds) + len(self.index._unused)

    @invariant()
    def counts_its_keys(self) -> None:
        assert self.index._num_used == np.count_nonzero(self.index._keys)


@pytest.fixture(autouse=True, scope="module")
def small_table() -> Iterator[None]:
    """So small that it grows, and that keys meet each other in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_index, "_FIRST_SIZE", 4)
        yield


IndexMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestIndex = IndexMachine.TestCase


def test_keys_that_want_one_place_are_found_after_each_growth() -> None:
    """The first and the last place of the table, behind which it goes on at its beginning."""
    hashes = [(key % 2**64).to_bytes(8, "little") + bytes(8) for key in (0, *range(2, 12), *range(-10, 0))]
    index = PrefixIndex()
    for number, added in enumerate(hashes):
        index.add(0, added)
        assert [index.leading_blocks([block_hash]) for block_hash in hashes[: number + 1]] == [{1: 1}] * (number + 1)
        assert index._num_used == number + 1


def test_it_grows_and_shrinks_with_what_is_held() -> None:
    index = PrefixIndex()
    for turn in range(20):
        index.add(0, joined(list(range(1000 * turn, 1000 * turn + 1000))))
        index.remove(0, joined(list(range(1000 * turn, 1000 * turn + 900))))
    assert len(index) == 2000
    assert index.num_bytes < 2000 * 12 * 5, "what nobody holds takes no room for long"
