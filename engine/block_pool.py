"""The owner of KV blocks and of the prefix cache.

A block's life:

    free → leased (→ published) → cached → leased again, by a prompt with the same prefix, or evicted: free
                               ↘ free, when it was never published

A block is *leased* while at least one lease holds it; several do when prompts share a prefix. It is *cached* when no lease
holds it but its content is published under a hash, and *free* otherwise. Cached blocks are evicted, least recently used
first, when there are no free ones. Not thread-safe: one event loop owns a pool.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from segue.errors import InternalError


class Lease:
    """Blocks that one holder may use until it releases them. Made by a pool; `block_ids` is for reading only."""

    __slots__ = ("block_ids", "is_released", "num_cached")

    def __init__(self, block_ids: Iterable[int], num_cached: int) -> None:
        # An array, whose memory kernels read as it is: a step copies no table of blocks.
        self.block_ids = array("i", block_ids)
        # Leading blocks that came out of the prefix cache, already computed.
        self.num_cached = num_cached
        self.is_released = False


class PrefixListener(Protocol):
    """Told of every change to what a pool has published."""

    def stored(self, block_hash: bytes) -> None: ...

    def evicted(self, block_hash: bytes) -> None: ...


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise InternalError(f"a block pool needs at least one block, not {num_blocks}")
        # Invariant: len(_free) + _num_leased + len(_cached) == _num_total; `check` recounts it.
        self._num_total = num_blocks
        # A heap, so that fresh blocks come out in ascending runs: contiguous memory travels in fewer pieces.
        self._free = list(range(num_blocks))
        self._num_leased = 0
        # Blocks without a lease that are still published, least recently used first.
        self._cached: dict[int, None] = {}
        # Leases that hold each block.
        self._num_holders = [0] * num_blocks
        # Invariant: _hashes[block] == h exactly when _published[h] == block.
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}
        self.listener: PrefixListener | None = None

    @property
    def num_total(self) -> int:
        return self._num_total

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_leased(self) -> int:
        return self._num_leased

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def published(self) -> Collection[bytes]:
        """Hashes of all blocks that a prompt could reuse, leased ones included."""
        return self._published.keys()

    @property
    def num_available(self) -> int:
        """Blocks that a lease without a prefix hit can get."""
        return len(self._free) + len(self._cached)

    def num_leading(self, hashes: Sequence[bytes]) -> int:
        """How many of a prompt's first blocks a lease would find computed."""
        return len(self._match(hashes))

    def lease(self, num_blocks: int, hashes: Sequence[bytes] = ()) -> Lease | None:
        """The longest published prefix of `hashes`, then fresh blocks, `num_blocks` together.

        None, and nothing has changed, when there are not enough blocks.
        """
        matched = self._match(hashes[:num_blocks])
        num_fresh = num_blocks - len(matched)
        if num_fresh > self.num_available - sum(block in self._cached for block in matched):
            return None
        self._hold(matched)
        fresh = self._take_fresh(num_fresh)
        return Lease(matched + fresh, num_cached=len(matched))

    def extend(self, lease: Lease, num_more: int = 1) -> bool:
        """Adds fresh blocks to the lease; False, and nothing has changed, when there are not enough."""
        self._require_held(lease)
        if num_more > self.num_available:
            return False
        lease.block_ids.extend(self._take_fresh(num_more))
        return True

    def publish(self, lease: Lease, index: int, block_hash: bytes) -> None:
        """Tells that the lease's block at `index` is full and computed, so that others may use it.

        When another block already has this hash nothing happens: one copy is enough.
        """
        self._require_held(lease)
        if not 0 <= index < len(lease.block_ids):
            raise InternalError(f"publish of block {index} of a lease of {len(lease.block_ids)}")
        block = lease.block_ids[index]
        if self._hashes[block] not in {None, block_hash}:
            raise InternalError(f"KV block {block} is published under another hash already")
        if self._hashes[block] is None and self._published.setdefault(block_hash, block) == block:
            self._hashes[block] = block_hash
            if self.listener is not None:
                self.listener.stored(block_hash)

    def share(self, block_ids: Sequence[int]) -> Lease:
        """Another lease on blocks that somebody holds now, released on its own."""
        if not all(self._num_holders[block] for block in block_ids):
            raise InternalError("only leased blocks can be shared")
        self._hold(block_ids)
        return Lease(list(block_ids), num_cached=0)

    def release(self, lease: Lease) -> None:
        """Raises InternalError when the lease was released before."""
        self._require_held(lease)
        lease.is_released = True
        # Backwards, so that the end of a prefix is evicted before its beginning, without which it is of no use.
        for block in reversed(lease.block_ids):
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            self._num_leased -= 1
            if self._hashes[block] is None:
                heapq.heappush(self._free, block)
            else:
                self._cached[block] = None

    def check(self) -> None:
        """Raises InternalError when an invariant is broken."""
        num_leased = sum(holders > 0 for holders in self._num_holders)
        if self.num_free + self._num_leased + self.num_cached != self._num_total or num_leased != self._num_leased:
            raise InternalError(
                f"KV blocks leaked: {self.num_free} free + {self._num_leased} leased ({num_leased} counted)"
                f" + {self.num_cached} cached != {self._num_total}"
            )
        idle = set(self._free) | self._cached.keys()
        if len(idle) != self.num_available or any(self._num_holders[block] for block in idle):
            raise InternalError("a KV block is in two states at once")
        if any(self._hashes[block] is not None for block in self._free):
            raise InternalError("a free KV block is still published")
        published = {block_hash: block for block, block_hash in enumerate(self._hashes) if block_hash is not None}
        if published != self._published:
            raise InternalError("the prefix cache does not agree with its blocks")

    def _require_held(self, lease: Lease) -> None:
        if lease.is_released:
            raise InternalError("a lease was used after its release")

    def _match(self, hashes: Iterable[bytes]) -> list[int]:
        matched: list[int] = []
        for block_hash in hashes:
            block = self._published.get(block_hash)
            if block is None:
                break
            matched.append(block)
        return matched

    def _hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if self._num_holders[block] == 0:
                del self._cached[block]
                self._num_leased += 1
            self._num_holders[block] += 1

    def _take_fresh(self, num_blocks: int) -> list[int]:
        while len(self._free) < num_blocks:
            self._evict_oldest()
        blocks = [heapq.heappop(self._free) for _ in range(num_blocks)]
        for block in blocks:
            self._num_holders[block] = 1
        self._num_leased += num_blocks
        return blocks

    def _evict_oldest(self) -> None:
        block = next(iter(self._cached))
        del self._cached[block]
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._published[block_hash]
            self._hashes[block] = None
            if self.listener is not None:
                self.listener.evicted(block_hash)
        heapq.heappush(self._free, block)
