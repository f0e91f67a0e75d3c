"""A cluster of real processes that can be killed, stopped or told to kill themselves, and that start again fast."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.nursery import Nursery
from segue.client import AsyncClient, RetryPolicy
from segue.config import LOOPBACK, RouterSettings, WorkerSettings
from segue.errors import DeadlineExceeded, SegueError

MODEL_NAME = "tiny"
# For a process to start, or to die of what it was told to.
_LIMIT_S = 60.0
# The router can only be asked.
_BETWEEN_LOOKS_S = 0.02
_TINY = {"threads": 1, "kv_memory": 2**20, "block_size": 4, "max_prefill_tokens": 32}


@dataclass
class ForkedCluster:
    """Workers are named `prefill-0` and the like, routers, all behind one address, `router-0`."""

    # host:port
    address: str
    # Tries nothing again.
    client: AsyncClient
    nursery: Nursery
    logs: Path
    common: dict[str, Any]
    router: dict[str, Any]
    worker: dict[str, Any]
    # The processes, as pidfds: a pid alone may be another's by now.
    _pidfds: dict[str, int] = field(default_factory=dict)
    pids: dict[str, int] = field(default_factory=dict)

    async def start(self, name: str, **settings: Any) -> None:
        """Starts the process, in place of one of that name, and waits until it serves: for a worker, until the router has its
        link. `settings` override the cluster's."""
        role = name.partition("-")[0]
        if role == "router":
            planned: RouterSettings | WorkerSettings = RouterSettings(
                **self.common | self.router | {"router_id": name} | settings
            )
        else:
            planned = WorkerSettings(**self.common | self.worker | {"worker_id": name, "roles": (role,)} | settings)
        pid = await self.nursery.start(planned, self.logs / f"{name}.log")
        self.kill(name)
        self._pidfds[name], self.pids[name] = os.pidfd_open(pid), pid
        await self.until_serving(name)

    async def until_serving(self, name: str) -> None:
        """Waits until the process gets requests."""
        pid = self.pids[name]
        await self._until(lambda ready: name.startswith("router") or pid in ready.values())

    def signal(self, name: str, number: signal.Signals) -> None:
        """Nothing happens to a process that has ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfds[name], number)

    def kill(self, name: str) -> None:
        """With SIGKILL, if it was ever started."""
        if name in self._pidfds:
            self.signal(name, signal.SIGKILL)
            os.close(self._pidfds.pop(name))
            del self.pids[name]

    def kill_all(self) -> None:
        for name in list(self._pidfds):
            self.kill(name)

    async def ready(self) -> dict[str, int]:
        """The pids of workers that get requests, by worker id."""
        workers = (await self.client.status()).workers
        return {worker.worker_id: worker.pid for worker in workers if worker.state == "ready"}

    async def until_gone(self, worker_id: str) -> None:
        """Waits until the process has ended and the router gives it nothing any more."""
        await self.until_dead(worker_id)
        await self._until(lambda ready: worker_id not in ready)

    async def until_dead(self, name: str) -> None:
        """Waits for the process's end."""
        loop, died, pidfd = asyncio.get_running_loop(), asyncio.Event(), self._pidfds[name]
        loop.add_reader(pidfd, died.set)
        try:
            async with asyncio.timeout(_LIMIT_S):
                await died.wait()
        finally:
            loop.remove_reader(pidfd)

    async def _until(self, holds: Callable[[dict[str, int]], bool]) -> None:
        ready: dict[str, int] = {}
        try:
            async with asyncio.timeout(_LIMIT_S):
                while True:
                    with suppress(SegueError):  # a router that starts or dies
                        if holds(ready := await self.ready()):
                            return
                    await asyncio.sleep(_BETWEEN_LOOKS_S)
        except TimeoutError:
            raise DeadlineExceeded(f"waited {_LIMIT_S} s in vain; ready are {ready} of {self.pids}") from None


@asynccontextmanager
async def forked_cluster(
    nursery: Nursery, redis_url: str, model_dir: Path, logs: Path, *, router: dict[str, Any] | None = None, **worker: Any
) -> AsyncIterator[ForkedCluster]:
    """One router, and no workers yet. `router` and `worker` override settings."""
    common = {"cluster_id": uuid.uuid4().hex[:12], "redis": redis_url, "model_dir": model_dir, "model_name": MODEL_NAME}
    port = _free_port()
    router = {"grpc_port": port, "http_port": 0, "shares_ports": True, "disaggregate": "always"} | (router or {})
    address = f"{LOOPBACK}:{port}"
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(AsyncClient(address, retry=RetryPolicy(max_attempts=1)))
        cluster = ForkedCluster(address, client, nursery, logs, common, router, _TINY | worker)
        stack.callback(cluster.kill_all)
        await cluster.start("router-0")
        yield cluster


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
