"""A cluster that was launched and serves: what it consists of, and a watch over it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from deploy.child import Child
from deploy.driver_events import DriverEvents
from deploy.processes import is_here, resident_bytes
from deploy.routers import Routers
from deploy.sweeper import session_members
from deploy.waiting import all_of, until_gone
from deploy.watch import WorkerWatch
from segue.errors import StoreUnavailable
from segue.membership import Membership
from segue.models.store import ModelHandle
from segue.v1.worker_pb2 import WorkerRecord

# A worker whose router has gone has nothing left to finish.
_DRAIN_S = 5.0
_LOOK_AT_LEAST_EVERY_S = 0.5

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """One process of the cluster. `memory_bytes` is resident memory; None for one on another host."""

    name: str
    role: str
    pid: int
    address: str
    memory_bytes: int | None


class Cluster:
    """Made by deploy.launch.Launch, which also ends it."""

    def __init__(
        self,
        cluster_id: str,
        model: ModelHandle,
        logs: Path,
        *,
        membership: Membership,
        routers: Routers,
        driver: Child,
        driver_events: DriverEvents,
        valkey: Child | None,
    ) -> None:
        self.id = cluster_id
        self.model = model
        # A folder with one log for each process.
        self.logs = logs
        self.membership = membership
        self.routers = routers
        self.driver = driver
        self.driver_events = driver_events
        self.valkey = valkey

    @property
    def http(self) -> str:
        """host:port of the OpenAI-compatible API."""
        return self.routers.http

    @property
    def grpc(self) -> str:
        return self.routers.grpc

    async def workers(self) -> list[WorkerRecord]:
        """Those that are announced now. Raises StoreUnavailable."""
        return await self.membership.list_workers()

    async def processes(self) -> list[ProcessInfo]:
        """Raises StoreUnavailable."""
        infos = [
            ProcessInfo(
                router.name,
                "router",
                router.child.pid,
                f"http {router.http}, grpc {router.grpc}",
                resident_bytes([router.child.pid]),
            )
            for router in self.routers.processes
        ]
        worker_pids = set()
        for record in await self.workers():
            memory = resident_bytes([record.pid]) if is_here(record.host) else None
            infos.append(ProcessInfo(record.worker_id, "+".join(record.roles), record.pid, record.address, memory))
            worker_pids.add(record.pid)
        # The driver leads the session of all that Ray starts here.
        helpers = set(session_members(self.driver.pid)) - worker_pids
        infos.append(
            ProcessInfo("ray", f"keeps workers, {len(helpers)} processes", self.driver.pid, "", resident_bytes(helpers))
        )
        if self.valkey is not None:
            infos.append(ProcessInfo("valkey", "membership", self.valkey.pid, "", resident_bytes([self.valkey.pid])))
        return infos

    async def watch(self, note: Note) -> None:
        """Says in one line each what happens to workers, routers and store, and brings routers back when they die.

        Runs until cancelled. Raises InternalError when the process that owns Ray is gone, and the workers with it.
        """
        await all_of(
            self._watch_workers(note),
            self._watch_replicas(note),
            self._watch_driver(),
            self._watch_store(note),
            self.routers.keep(self.membership, note),
        )

    async def _watch_workers(self, note: Note) -> None:
        watch = WorkerWatch(await self.workers())
        reachable, problem = True, ""
        async for _ in self.membership.changes(_LOOK_AT_LEAST_EVERY_S):
            if self.driver_events.problem != problem and (problem := self.driver_events.problem):
                note(problem)
            try:
                lines = watch.look(await self.workers())
            except StoreUnavailable as error:
                if reachable:
                    note(f"{error.message}; what is there serves on")
                reachable = False
                continue
            reachable = True
            for line in lines:
                note(line)

    async def _watch_replicas(self, note: Note) -> None:
        while True:
            note((await self.driver_events.next_ended()).note())

    async def _watch_driver(self) -> None:
        await asyncio.shield(self.driver.exited)
        raise self.driver.died()

    async def _watch_store(self, note: Note) -> None:
        if self.valkey is not None:
            await asyncio.shield(self.valkey.exited)
            note("the embedded Valkey died: requests are served on, but no worker can join until the cluster is started again")

    async def stop_workers(self) -> None:
        """Tells the workers on this host to leave, and waits a moment; others go with their Ray actors."""
        try:
            pids = [record.pid for record in await self.workers() if is_here(record.host)]
        except StoreUnavailable:
            return
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                await all_of(*(until_gone(pid) for pid in pids))
