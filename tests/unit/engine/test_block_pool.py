"""The block pool against a simple model of it: sets of leases and published hashes, no free list, no counters."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from engine.block_pool import BlockPool, Lease
from segue.errors import InternalError

NUM_BLOCKS = 8
# Few, so that prompts often share a prefix.
HASHES = [bytes([index]) for index in range(5)]


@dataclass(eq=False)
class Held:
    lease: Lease
    # What the holder believes it has; the pool must never change it behind its back.
    blocks: list[int]


class PoolMachine(RuleBasedStateMachine):
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.held: list[Held] = []
        # hash → block, for all that were published and not seen evicted.
        self.published: dict[bytes, int] = {}
        # Blocks of `published` that nobody holds, least recently released first.
        self.lru: list[int] = []

    def in_use(self) -> set[int]:
        return {block for held in self.held for block in held.blocks}

    def take(self, fresh: list[int], num_free: int) -> None:
        """Fresh blocks were nobody's; what they cost the prefix cache is its oldest part and no more."""
        assert len(set(fresh)) == len(fresh)
        assert not set(fresh) & self.in_use()
        evicted = self.lru[: max(0, len(fresh) - num_free)]
        self.lru = self.lru[len(evicted) :]
        self.published = {h: block for h, block in self.published.items() if block not in evicted}
        assert not set(fresh) & set(self.lru)

    @rule(target=leases, num_blocks=st.integers(0, 5), hashes=st.lists(st.sampled_from(HASHES), unique=True, max_size=5))
    def lease(self, num_blocks: int, hashes: list[bytes]) -> Held | None:
        matched = []
        for block_hash in hashes[:num_blocks]:
            if block_hash not in self.published:
                break
            matched.append(self.published[block_hash])
        assert self.pool.num_leading(hashes[:num_blocks]) == len(matched)
        before = self.counts()
        num_free = self.pool.num_free
        lease = self.pool.lease(num_blocks, hashes)
        available = NUM_BLOCKS - len(self.in_use() | set(matched))
        if num_blocks - len(matched) > available:
            assert lease is None
            assert self.counts() == before
            return None
        assert lease is not None
        assert lease.num_cached == len(matched)
        assert list(lease.block_ids[: len(matched)]) == matched
        assert len(lease.block_ids) == num_blocks
        self.lru = [block for block in self.lru if block not in matched]
        held = Held(lease, list(matched))
        self.held.append(held)
        self.take(lease.block_ids[len(matched) :], num_free)
        held.blocks = list(lease.block_ids)
        return held

    @rule(held=leases, num_more=st.integers(1, 3))
    def extend(self, held: Held | None, num_more: int) -> None:
        if held not in self.held:
            return
        available, num_free = NUM_BLOCKS - len(self.in_use()), self.pool.num_free
        assert self.pool.extend(held.lease, num_more) == (num_more <= available)
        if num_more <= available:
            assert list(held.lease.block_ids[:-num_more]) == held.blocks
            self.take(held.lease.block_ids[-num_more:], num_free)
            held.blocks = list(held.lease.block_ids)

    @rule(held=leases, index=st.integers(0, 4), block_hash=st.sampled_from(HASHES))
    def publish(self, held: Held | None, index: int, block_hash: bytes) -> None:
        if held not in self.held or index >= len(held.blocks):
            return
        block = held.blocks[index]
        others = {other for other, published in self.published.items() if published == block} - {block_hash}
        if others:
            with pytest.raises(InternalError, match="another hash"):
                self.pool.publish(held.lease, index, block_hash)
        else:
            self.pool.publish(held.lease, index, block_hash)
            self.published.setdefault(block_hash, block)

    @rule(target=leases, held=leases)
    def share(self, held: Held | None) -> Held | None:
        if held not in self.held:
            return None
        copy = Held(self.pool.share(held.lease.block_ids), list(held.blocks))
        self.held.append(copy)
        return copy

    @rule(held=consumes(leases))
    def release(self, held: Held | None) -> None:
        if held not in self.held:
            return
        self.held.remove(held)
        self.pool.release(held.lease)
        idle = set(self.published.values()) - self.in_use() - set(self.lru)
        self.lru += [block for block in reversed(held.blocks) if block in idle]
        with pytest.raises(InternalError, match="after its release"):
            self.pool.release(held.lease)

    def counts(self) -> tuple[int, int, int]:
        return self.pool.num_free, self.pool.num_leased, self.pool.num_cached

    @invariant()
    def pool_agrees(self) -> None:
        self.pool.check()
        num_leased, num_cached = len(self.in_use()), len(self.lru)
        assert self.counts() == (NUM_BLOCKS - num_leased - num_cached, num_leased, num_cached)
        assert self.pool.num_available == NUM_BLOCKS - num_leased
        assert all(list(held.lease.block_ids) == held.blocks for held in self.held)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def leased(pool: BlockPool, *args: object) -> Lease:
    lease = pool.lease(*args)
    assert lease is not None
    return lease


def test_fresh_blocks_come_in_ascending_runs():
    pool = BlockPool(8)
    first, second, third = (leased(pool, 2) for _ in range(3))
    assert [list(lease.block_ids) for lease in (first, second, third)] == [[0, 1], [2, 3], [4, 5]]
    pool.release(second)
    pool.release(first)
    assert list(leased(pool, 5).block_ids) == [0, 1, 2, 3, 6]


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    pool = BlockPool(4)
    lease = leased(pool, 3)
    for index in range(3):
        pool.publish(lease, index, HASHES[index])
    pool.release(lease)
    leased(pool, 2)
    assert leased(pool, 2, HASHES[:3]).num_cached == 2


def test_blocks_just_matched_are_never_evicted_for_the_same_lease():
    pool = BlockPool(3)
    lease = leased(pool, 2)
    pool.publish(lease, 0, HASHES[0])
    pool.publish(lease, 1, HASHES[1])
    pool.release(lease)
    again = leased(pool, 3, HASHES[:2])
    assert (again.num_cached, list(again.block_ids)) == (2, [0, 1, 2])
    assert pool.lease(1) is None


def test_a_released_lease_is_of_no_use():
    pool = BlockPool(2)
    lease = leased(pool, 1)
    pool.release(lease)
    for use in (pool.release, pool.extend, lambda lease: pool.publish(lease, 0, b"h")):
        with pytest.raises(InternalError, match="after its release"):
            use(lease)


def test_only_leased_blocks_can_be_shared():
    pool = BlockPool(3)
    lease = leased(pool, 2)
    shared = pool.share(lease.block_ids)
    pool.release(lease)
    assert (list(shared.block_ids), shared.num_cached, pool.num_leased) == ([0, 1], 0, 2)
    with pytest.raises(InternalError, match="only leased blocks"):
        pool.share([0, 2])
    assert pool.num_leased == 2
    pool.release(shared)
    assert pool.num_free == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._free.pop(),
        lambda pool: pool._free.append(pool._free[0]),
        lambda pool: pool._published.update({b"x": 1}),
        lambda pool: pool._cached.update({0: None}),
        lambda pool: pool._num_holders.__setitem__(3, 1),
    ],
)
def test_check_finds_damage(damage):
    pool = BlockPool(4)
    leased(pool, 1)
    pool.check()
    damage(pool)
    with pytest.raises(InternalError):
        pool.check()
