"""How many workers there shall be: what operators ask for, and what becomes of it. In Redis, for all routers and the driver.

segue:<cluster>:pools:wanted      PoolSizes; stays, so that it also holds for the cluster's next start
segue:<cluster>:pools:revision    counter; every wish takes the next value
segue:<cluster>:pools:report      PoolReport, under a lease: there as long as somebody starts and ends workers
"""

from __future__ import annotations

import redis.asyncio as redis_client

from segue.config import Role
from segue.membership import as_store_unavailable
from segue.v1.worker_pb2 import PoolReport, PoolSizes


def pool_roles(prefill: int, decode: int) -> dict[str, tuple[Role, ...]]:
    """The ids of the workers of both pools, and their roles."""
    names: dict[str, tuple[Role, ...]] = {f"prefill-{number}": ("prefill",) for number in range(prefill)}
    return names | {f"decode-{number}": ("decode",) for number in range(decode)}


class PoolStore:
    """Every method raises StoreUnavailable when Redis does not answer."""

    def __init__(self, redis_url: str, cluster_id: str) -> None:
        self._redis = redis_client.Redis.from_url(redis_url, socket_connect_timeout=2.0, socket_timeout=5.0)
        self._prefix = f"segue:{cluster_id}:pools"

    async def __aenter__(self) -> PoolStore:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._redis.aclose()

    async def ask(self, prefill: int, decode: int) -> PoolSizes:
        async with as_store_unavailable():
            revision = await self._redis.incr(f"{self._prefix}:revision")
            wanted = PoolSizes(prefill=prefill, decode=decode, revision=revision)
            await self._redis.set(f"{self._prefix}:wanted", wanted.SerializeToString())
        return wanted

    async def wanted(self) -> PoolSizes | None:
        """None: nobody has ever asked."""
        async with as_store_unavailable():
            data = await self._redis.get(f"{self._prefix}:wanted")
        return None if data is None else PoolSizes.FromString(data)  # type: ignore[arg-type]  # responses are not decoded

    async def tell(self, report: PoolReport, lease_ms: int) -> None:
        async with as_store_unavailable():
            await self._redis.set(f"{self._prefix}:report", report.SerializeToString(), px=lease_ms)

    async def report(self) -> PoolReport | None:
        """None: nobody follows."""
        async with as_store_unavailable():
            data = await self._redis.get(f"{self._prefix}:report")
        return None if data is None else PoolReport.FromString(data)  # type: ignore[arg-type]  # responses are not decoded
