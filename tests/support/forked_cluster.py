"""A router in the test's own process; workers in real ones, which can be killed, or kill themselves, and start again fast."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from router.app import serving_router
from router.front import Front
from segue import AsyncClient, RetryPolicy
from segue.config import RouterSettings, WorkerSettings
from tests.support.leaks import assert_no_leaks_at

MODEL_NAME = "tiny"
# For a worker to start, or to die of what it was told to.
_LIMIT_S = 150.0
_NURSERY = Path(__file__).with_name("nursery.py")


@dataclass
class Nursery:
    process: asyncio.subprocess.Process
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def start_worker(self, settings: WorkerSettings, log: Path) -> int:
        """Its pid."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        env = settings.to_env() | {"LOG": str(log), "OMP_NUM_THREADS": "1"}
        async with self._turn:
            self.process.stdin.write(json.dumps(env).encode() + b"\n")
            return int(await self.process.stdout.readline())


@asynccontextmanager
async def running_nursery() -> AsyncIterator[Nursery]:
    """Its workers end when the block does."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(_NURSERY), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield Nursery(process)
    finally:
        process.kill()
        await process.communicate()


@dataclass
class ForkedCluster:
    front: Front
    # Tries nothing again.
    client: AsyncClient
    nursery: Nursery
    logs: Path
    settings: dict[str, Any]
    # The processes, as pidfds: a pid alone may be another's by now.
    _pidfds: dict[str, int] = field(default_factory=dict)

    async def start(self, worker_id: str, **settings: Any) -> None:
        """Starts `prefill-0` or the like, and waits until the router has its link. `settings` override the cluster's."""
        role = worker_id.partition("-")[0]
        worker = WorkerSettings(**self.settings | {"worker_id": worker_id, "roles": (role,)} | settings)
        pid = await self.nursery.start_worker(worker, self.logs / f"{worker_id}.log")
        self.kill(worker_id)
        self._pidfds[worker_id] = os.pidfd_open(pid)
        await self._until(lambda ready: pid in ready.values())

    def kill(self, worker_id: str) -> None:
        """With SIGKILL, if it was ever started."""
        if (pidfd := self._pidfds.pop(worker_id, None)) is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)

    def kill_all(self) -> None:
        for worker_id in list(self._pidfds):
            self.kill(worker_id)

    async def until_gone(self, worker_id: str) -> None:
        """Waits until the process has ended and the router gives it nothing any more."""
        await self.until_dead(worker_id)
        await self._until(lambda ready: worker_id not in ready)

    async def until_dead(self, worker_id: str) -> None:
        """Waits for the process's end."""
        loop, died, pidfd = asyncio.get_running_loop(), asyncio.Event(), self._pidfds[worker_id]
        loop.add_reader(pidfd, died.set)
        try:
            async with asyncio.timeout(_LIMIT_S):
                await died.wait()
        finally:
            loop.remove_reader(pidfd)

    async def _until(self, holds: Callable[[dict[str, int]], bool]) -> None:
        """`holds` is asked of the ready workers' pids, by worker id."""
        async with asyncio.timeout(_LIMIT_S):
            while True:
                workers = (await self.client.status()).workers
                if holds({worker.worker_id: worker.pid for worker in workers if worker.state == "ready"}):
                    return
                await asyncio.sleep(0.02)  # the router can only be asked


@asynccontextmanager
async def forked_cluster(
    nursery: Nursery, redis_url: str, model_dir: Path, logs: Path, *, router: dict[str, Any] | None = None, **worker: Any
) -> AsyncIterator[ForkedCluster]:
    """No workers yet. `router` and `worker` override settings. Checks for leaks before it stops."""
    common = {"cluster_id": uuid.uuid4().hex[:12], "redis": redis_url, "model_dir": model_dir, "model_name": MODEL_NAME}
    options = {"threads": 1, "kv_memory": 2**20, "block_size": 4, "max_prefill_tokens": 32}
    async with AsyncExitStack() as stack:
        settings = RouterSettings(**common, **({"http_port": 0, "grpc_port": 0} | (router or {})))
        front = await stack.enter_async_context(serving_router(settings))
        retry = RetryPolicy(max_attempts=1)
        client = await stack.enter_async_context(AsyncClient(front.grpc_address, retry=retry))
        cluster = ForkedCluster(front, client, nursery, logs, common | options | worker)
        stack.callback(cluster.kill_all)
        yield cluster
        await assert_no_leaks_at(front.grpc_address)
