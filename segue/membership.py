"""Who is in the cluster: records in Redis, each under a lease that its worker or router renews.

    segue:<cluster>:worker:<worker id>    WorkerRecord, expires with the lease
    segue:<cluster>:router:<router id>    RouterRecord, likewise
    segue:<cluster>:epoch                 counter; every start of a worker takes the next value
    segue:<cluster>:epochs                hash: the newest epoch that each worker id was announced with
    segue:<cluster>:group:<group>         the address of a worker's rank 0, once for each of the ranks that are to take it
    segue:<cluster>:changes               channel, one message for every arrival, change and departure

A record outlives its owner by one lease at most. Readers treat the store as a hint: the link to a worker is what counts,
and while the store is away they go on with what they know.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

import redis.asyncio as redis_client
from google.protobuf.message import DecodeError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from segue.errors import StoreUnavailable, WorkerLost
from segue.runtime import background
from segue.v1.worker_pb2 import RouterRecord, WorkerRecord

logger = logging.getLogger(__name__)

# Deletes a worker's record only if it is still that of the epoch which leaves: a restarted worker may have replaced it.
_WITHDRAW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) else return 0 end"
# Not for a worker whose place a later epoch has taken: one that was cut off, and was replaced meanwhile. KEYS: the record, the
# newest epochs. ARGV: the data, lease in ms, worker id or empty, epoch. Gives the newest epoch if that is a later one, else
# what the record was before.
_ANNOUNCE = """
if ARGV[3] ~= '' then
  local newest = tonumber(redis.call('HGET', KEYS[2], ARGV[3]) or '0')
  if newest > tonumber(ARGV[4]) then return newest end
  redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
end
return redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2], 'GET')
"""
# Ranks that have not come by then are not coming.
_ADDRESS_LIFETIME_S = 600
# Shorter than the time after which a silent store is taken to be away.
_BLOCK_S = 2
_STORE_ERRORS = (RedisError, OSError, asyncio.TimeoutError)


Record = WorkerRecord | RouterRecord
RecordT = TypeVar("RecordT", WorkerRecord, RouterRecord)
_KINDS: dict[type[Record], str] = {WorkerRecord: "worker", RouterRecord: "router"}


class Membership:
    """The records of one cluster. Every method raises StoreUnavailable when the store does not answer."""

    def __init__(self, redis_url: str, cluster_id: str) -> None:
        self._redis = redis_client.Redis.from_url(redis_url, socket_connect_timeout=2.0, socket_timeout=5.0)
        self._prefix = f"segue:{cluster_id}"

    async def __aenter__(self) -> Membership:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._redis.aclose()

    async def next_epoch(self) -> int:
        """A number above all that were handed out in this cluster."""
        async with as_store_unavailable():
            return int(await self._redis.incr(f"{self._prefix}:epoch"))

    async def leave_address(self, group: str, address: str, num_takers: int) -> None:
        """For `take_address` on the other ranks of a group, each of which takes it once."""
        async with as_store_unavailable():
            await self._redis.rpush(self._group_key(group), *[address] * num_takers)
            await self._redis.expire(self._group_key(group), _ADDRESS_LIFETIME_S)

    async def take_address(self, group: str) -> str:
        """Waits until rank 0 of the group left its address."""
        found = None
        while found is None:
            async with as_store_unavailable():
                found = await self._redis.blpop([self._group_key(group)], timeout=_BLOCK_S)
        address = found[1]
        return address.decode() if isinstance(address, bytes) else address

    async def announce(self, record: Record, lease_ms: int) -> None:
        """Writes `record` for `lease_ms`, and tells the listeners if it differs from what was there. Raises WorkerLost when a
        later epoch of the worker was announced already."""
        fence = (record.worker_id, record.epoch) if isinstance(record, WorkerRecord) else ("", 0)
        async with as_store_unavailable():
            data = record.SerializeToString(deterministic=True)
            keys = (self._key(record), f"{self._prefix}:epochs")
            before = await self._redis.eval(_ANNOUNCE, len(keys), *keys, data, lease_ms, *fence)
            if isinstance(before, int):
                raise WorkerLost(f"epoch {before} has taken the place of worker {fence[0]}, epoch {fence[1]}")
            if before != data:
                await self._redis.publish(f"{self._prefix}:changes", _name(record))

    async def withdraw(self, record: Record) -> None:
        async with as_store_unavailable():
            data = record.SerializeToString(deterministic=True)
            await self._redis.eval(_WITHDRAW, 1, self._key(record), data)
            await self._redis.publish(f"{self._prefix}:changes", _name(record))

    async def list_workers(self) -> list[WorkerRecord]:
        """Records whose lease holds, in order of worker id. Records that cannot be read are left out, and logged."""
        return await self._list(WorkerRecord)

    async def list_routers(self) -> list[RouterRecord]:
        """As `list_workers`, of routers."""
        return await self._list(RouterRecord)

    async def _list(self, record_class: type[RecordT]) -> list[RecordT]:
        async with as_store_unavailable():
            match = f"{self._prefix}:{_KINDS[record_class]}:*"
            keys = sorted([key async for key in self._redis.scan_iter(match=match, count=1000)])
            values = await self._redis.mget(keys) if keys else []
        records = []
        for key, value in zip(keys, values, strict=True):
            if value is None:  # lapsed since the scan
                continue
            try:
                records.append(record_class.FromString(value))  # type: ignore[arg-type]  # responses are not decoded
            except DecodeError:
                logger.warning("the membership record %r cannot be read and is left out", key)
        return records

    async def changes(self, interval_s: float) -> AsyncGenerator[None, None]:
        """Yields at once, then whenever something changed, and every `interval_s` at least (leases lapse silently)."""
        yield
        loop, pubsub = asyncio.get_running_loop(), self._redis.pubsub()
        try:
            while True:
                try:
                    async with as_store_unavailable():
                        if not pubsub.subscribed:
                            await pubsub.subscribe(f"{self._prefix}:changes")
                        begin_s = loop.time()
                        message = await pubsub.get_message(timeout=interval_s)
                        if message is None and loop.time() - begin_s < interval_s / 2:
                            # redis takes a connection that timed out (ETIMEDOUT) for one that has nothing to say, for ever.
                            await pubsub.aclose()  # type: ignore[no-untyped-call]
                            pubsub = self._redis.pubsub()
                            raise RedisConnectionError("the connection timed out")
                except StoreUnavailable:
                    await asyncio.sleep(interval_s)  # nothing to wait for while the store is away
                yield
        finally:
            await pubsub.aclose()  # type: ignore[no-untyped-call]

    def _group_key(self, group: str) -> str:
        return f"{self._prefix}:group:{group}"

    def _key(self, record: Record) -> str:
        return f"{self._prefix}:{_KINDS[type(record)]}:{_name(record)}"


def _name(record: Record) -> str:
    return record.worker_id if isinstance(record, WorkerRecord) else record.router_id


@asynccontextmanager
async def as_store_unavailable() -> AsyncIterator[None]:
    """Turns what goes wrong with the store into StoreUnavailable, and lets no cancellation get lost.

    redis may swallow one that comes while it makes a connection; but the task has counted it.
    """
    num_before = _num_cancellations()
    failure: Exception | None = None
    try:
        yield
    except _STORE_ERRORS as error:
        failure = error
    if _num_cancellations() > num_before:
        raise asyncio.CancelledError from failure
    if failure is not None:
        raise StoreUnavailable(f"the membership store does not answer: {failure}") from failure


def _num_cancellations() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


@asynccontextmanager
async def held_lease(
    membership: Membership, record: Callable[[], Record], lease_ms: int, *, must_begin: bool = True
) -> AsyncIterator[None]:
    """Keeps `record()` announced until the block ends, then withdraws it. The first announcement must succeed, unless
    `must_begin` is False; later failures are logged once each time the store goes away, and retried: serving does not depend
    on the store. Ends the block with WorkerLost when a later epoch of the worker was announced."""
    try:
        await membership.announce(record(), lease_ms)
    except StoreUnavailable:
        if must_begin:
            raise
    try:
        async with background(_renew(membership, record, lease_ms)):
            yield
    finally:
        try:
            await membership.withdraw(record())
        except StoreUnavailable as error:
            logger.warning("left without withdrawing, the lease will lapse: %s", error.message)


async def _renew(membership: Membership, record: Callable[[], Record], lease_ms: int) -> None:
    reachable = True
    while True:
        await asyncio.sleep(lease_ms / 3000)
        try:
            await membership.announce(record(), lease_ms)
        except StoreUnavailable as error:
            if reachable:
                logger.warning("lease not renewed: %s", error.message)
            reachable = False
        else:
            reachable = True
