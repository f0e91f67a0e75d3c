"""Follows what operators ask for (`segue scale`): starts the workers that are missing, and has those too many leave.

    a wish ──► missing ones are started
           └─► those too many: told over their link to drain ──nothing left──► they leave, and are let go
                               never came, or are not in the membership for a while ──► ended: they serve nobody

A worker that somebody else told to leave is missed by the next wish only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable
from contextlib import aclosing, suppress
from typing import Protocol

import grpc.aio

from segue.cluster_secret import ClusterSecret
from segue.errors import StoreUnavailable
from segue.link_tls import CHANNEL_OPTIONS as TLS_OPTIONS
from segue.link_tls import LinkCredentials
from segue.membership import Membership
from segue.pools import PoolStore, pool_roles
from segue.v1 import worker_pb2
from segue.v1.worker_pb2 import PoolReport, PoolSizes, WorkerRecord
from segue.v1.worker_pb2_grpc import WorkerServiceStub
from segue.worker_link import LINK_OPTIONS

logger = logging.getLogger(__name__)

_LOOK_AT_LEAST_EVERY_S = 0.5
_REPORT_LEASE_MS = 5_000
# What still runs on a worker that is too many goes on on other workers after so long.
_GRACE_S = 60.0
# Longer than a worker takes to leave, once it has withdrawn its record.
_ABSENCE_LIMIT_S = 10.0
_ANSWER_LIMIT_S = 5.0


class Replicas(Protocol):
    """Whatever runs the workers."""

    @property
    def running(self) -> Collection[str]:
        """Worker ids of all that were started and have not left."""

    def start(self, worker_id: str) -> None: ...

    def end(self, worker_id: str) -> None:
        """At once; it is gone from `running` a moment later."""

    def what_is_missing(self, worker_ids: Iterable[str]) -> str:
        """What these, which do not serve yet, wait for; empty if nothing is known."""


class Scaling:
    def __init__(self, replicas: Replicas, membership: Membership, store: PoolStore, secret: ClusterSecret | None) -> None:
        self._replicas = replicas
        self._membership = membership
        self._store = store
        self._credentials = LinkCredentials.of(secret).channel if secret is not None else None
        # The wish that is followed.
        self._wanted = _sizes_of(replicas.running)
        # Workers that were told to leave, with the epoch that was told; until they are gone.
        self._told: dict[str, int] = {}
        # Workers that were in the membership since they were started.
        self._seen: set[str] = set()
        # Since when workers that are too many have not been in the membership.
        self._absent_since_s: dict[str, float] = {}

    async def run(self) -> None:
        """Until it is cancelled. While the store is away nothing is followed."""
        async with aclosing(self._membership.changes(_LOOK_AT_LEAST_EVERY_S)) as changes:
            async for _ in changes:
                with suppress(StoreUnavailable):
                    await self.look()

    async def look(self) -> None:
        """Does what is to be done now. Raises StoreUnavailable."""
        asked = await self._store.wanted() or self._wanted
        records = {record.worker_id: record for record in await self._membership.list_workers()}
        self._seen |= records.keys()
        is_new, self._wanted = asked != self._wanted, asked
        wanted = pool_roles(asked.prefill, asked.decode)
        for worker_id in missing(wanted, self._replicas.running):
            if is_new or worker_id in self._told:
                self._told.pop(worker_id, None)
                self._seen.discard(worker_id)
                self._replicas.start(worker_id)
        leaving = too_many(wanted, self._replicas.running)
        await asyncio.gather(*(self._send_away(worker_id, records.get(worker_id)) for worker_id in leaving))
        self._forget_all_but(leaving, wanted)
        starting = [worker_id for worker_id in wanted if worker_id not in records or worker_id in self._told]
        report = PoolReport(wanted=asked, starting=starting, leaving=leaving, problem=self._replicas.what_is_missing(starting))
        await self._store.tell(report, _REPORT_LEASE_MS)

    async def _send_away(self, worker_id: str, record: WorkerRecord | None) -> None:
        if record is None:
            since_s = self._absent_since_s.setdefault(worker_id, time.monotonic())
            if worker_id not in self._seen or time.monotonic() - since_s > _ABSENCE_LIMIT_S:
                self._replicas.end(worker_id)
            return
        self._absent_since_s.pop(worker_id, None)
        if self._told.get(worker_id) != record.epoch and await tell_to_leave(record, self._credentials):
            self._told[worker_id] = record.epoch

    def _forget_all_but(self, leaving: Collection[str], wanted: Collection[str]) -> None:
        for worker_id in self._absent_since_s.keys() - set(leaving):
            del self._absent_since_s[worker_id]
        # One that is wanted again leaves all the same, and is started once it is gone.
        for worker_id in self._told.keys() - set(leaving) - set(wanted):
            del self._told[worker_id]


def missing(wanted: Iterable[str], running: Collection[str]) -> list[str]:
    return [worker_id for worker_id in wanted if worker_id not in running]


def too_many(wanted: Collection[str], running: Iterable[str]) -> list[str]:
    """The highest numbers are."""
    return sorted((worker_id for worker_id in running if worker_id not in wanted), key=_place, reverse=True)


def _place(worker_id: str) -> tuple[str, int]:
    role, _, number = worker_id.rpartition("-")
    return role, int(number)


def _sizes_of(running: Iterable[str]) -> PoolSizes:
    roles = [worker_id.partition("-")[0] for worker_id in running]
    return PoolSizes(prefill=roles.count("prefill"), decode=roles.count("decode"))


async def tell_to_leave(record: WorkerRecord, credentials: grpc.ChannelCredentials | None) -> bool:
    """Whether the worker of this record's epoch has begun to: it then tells every router, as after a word from one of them."""
    if credentials is None:
        channel = grpc.aio.insecure_channel(record.address, options=LINK_OPTIONS)
    else:
        channel = grpc.aio.secure_channel(record.address, credentials, options=[*LINK_OPTIONS, *TLS_OPTIONS])
    drain = worker_pb2.DrainWorker(grace_ms=int(_GRACE_S * 1000), departure=worker_pb2.DEPARTURE_LEAVE)
    try:
        async with asyncio.timeout(_ANSWER_LIMIT_S), channel:
            call = WorkerServiceStub(channel).Link()
            await call.write(worker_pb2.LinkRequest(open=worker_pb2.OpenLink(router_id="scaling")))
            async for message in call:
                if message.HasField("opened"):
                    if message.opened.worker.epoch != record.epoch:
                        return False
                    await call.write(worker_pb2.LinkRequest(drain=drain))
                elif message.HasField("worker_changed"):
                    return message.worker_changed.worker.draining
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
        logger.warning("%s could not be told to leave, and is told again: %r", record.worker_id, error)
    return False
