"""What a worker tells its routers of its prefix cache: one snapshot, then what changed, coalesced.

    stored, evicted, stored, ...  →  the net change since the last message  →  CacheEvents to every link

A block that came and went between two messages is never told of, so a message is never larger than the cache, however fast it
turns over. A router that reads too slowly misses messages and gets another snapshot when it has caught up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from segue.v1 import worker_pb2 as pb


class CacheFeed:
    """Listens to a cache whose hashes are `published()` now. Numbers are the feed's: the same on all links."""

    def __init__(self, published: Callable[[], Collection[bytes]]) -> None:
        self._published = published
        self._stored: set[bytes] = set()
        self._evicted: set[bytes] = set()
        self._number = 0
        # Set while there is something to tell.
        self.changed = asyncio.Event()

    def stored(self, block_hash: bytes) -> None:
        self._note(block_hash, self._evicted, self._stored)

    def evicted(self, block_hash: bytes) -> None:
        self._note(block_hash, self._stored, self._evicted)

    def _note(self, block_hash: bytes, undone: set[bytes], done: set[bytes]) -> None:
        if block_hash in undone:
            undone.remove(block_hash)
        else:
            done.add(block_hash)
        self.changed.set()

    def take(self) -> pb.CacheEvents | None:
        """What changed since this was called last; None when nothing did."""
        self.changed.clear()
        if not self._stored and not self._evicted:
            return None
        self._number += 1
        events = pb.CacheEvents(number=self._number, stored=b"".join(self._stored), evicted=b"".join(self._evicted))
        self._stored.clear()
        self._evicted.clear()
        return events

    def snapshot(self) -> pb.CacheEvents:
        """All there is. To be asked for when nothing waits to be taken: what is taken next comes after it."""
        return pb.CacheEvents(number=self._number, snapshot=True, stored=b"".join(self._published()))
