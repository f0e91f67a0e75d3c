"""Keeps callers to the limits of their API keys: requests and tokens in a minute, over all routers.

A request takes what it may need at most when it comes, and gives back what it did not need when it ends. While the store is
away each router keeps the limits by itself: two of them then allow twice as much, and say so in their logs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from router.caller import Caller
from segue.errors import RateLimited, StoreUnavailable
from segue.quota_store import QuotaStore, refilled

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Taken:
    """Tokens that a request was given, and those that it used in the end: none, if it never came so far."""

    num_tokens: int
    num_used: int = 0


@dataclass(slots=True)
class _Buckets:
    requests: float
    tokens: float
    at_s: float


class LocalQuotas:
    """The limits as one router knows them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, _Buckets] = {}

    def take(self, key_id: str, limits: tuple[int, int], requests: int, tokens: int, *, always: bool = False) -> float:
        """As QuotaStore.take."""
        now_s = self._clock()
        had = self._buckets.setdefault(key_id, _Buckets(limits[0], limits[1], now_s))
        wait_s, left = 0.0, [0.0, 0.0]
        for index, (limit, wanted, before) in enumerate(
            zip(limits, (requests, tokens), (had.requests, had.tokens), strict=True)
        ):
            if limit:
                has = refilled(before, limit, now_s - had.at_s)
                if wanted > has and not always:
                    wait_s = max(wait_s, (wanted - has) * 60 / limit)
                left[index] = min(float(limit), has - wanted)
        if not wait_s:
            self._buckets[key_id] = _Buckets(left[0], left[1], now_s)
        return wait_s


class Quotas:
    def __init__(self, store: QuotaStore, local: LocalQuotas | None = None) -> None:
        self._store = store
        self._local = local or LocalQuotas()
        self._store_answers = True

    @asynccontextmanager
    async def taken(self, caller: Caller, num_tokens: int) -> AsyncIterator[Taken]:
        """Around one request that may take so many tokens. Raises RateLimited at once when the caller's key does not have them
        now."""
        limits = (caller.limits.requests_per_minute or 0, caller.limits.tokens_per_minute or 0)
        if not any(limits):
            yield Taken(num_tokens)
            return
        # Whoever asks for more than a minute allows waits for a full bucket, and pays the rest afterwards.
        taken = Taken(min(num_tokens, limits[1]) if limits[1] else 0)
        wait_s = await self._take(caller.key_id, limits, 1, taken.num_tokens)
        if wait_s:
            raise RateLimited(
                f"the API key's limits of {_describe(limits)} a minute are reached; try again in {wait_s:.1f} s",
                retry_after_s=wait_s,
            )
        try:
            yield taken
        finally:
            if limits[1]:
                await self._take(caller.key_id, limits, 0, taken.num_used - taken.num_tokens, always=True)

    async def _take(self, key_id: str, limits: tuple[int, int], requests: int, tokens: int, *, always: bool = False) -> float:
        try:
            wait_s = await self._store.take(key_id, limits, requests, tokens, always=always)
        except StoreUnavailable as error:
            if self._store_answers:
                logger.warning("limits are kept by this router alone: %s", error.message)
            self._store_answers = False
            return self._local.take(key_id, limits, requests, tokens, always=always)
        self._store_answers = True
        return wait_s


def _describe(limits: tuple[int, int]) -> str:
    return " and ".join(f"{limit} {name}" for limit, name in zip(limits, ("requests", "tokens"), strict=True) if limit)
