"""A whole cluster as child processes of this one, without Ray: for benchmarks and for tests that kill parts of it.

    store → (router ∥ workers) → ready

Every child dies with this process, even if that is killed. Logs stay in `cluster.logs`; when a part does not start, the error
ends with the last lines of its log.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deploy.calibrated import ensure_ready
from deploy.child import Child, FirstWord, log_tail
from deploy.plan import plan_router, plan_workers
from deploy.probe import until_ready
from deploy.router_process import RouterProcess
from deploy.valkey import embedded_valkey
from deploy.waiting import all_of, in_daemon_thread
from segue.client import AsyncClient
from segue.config import ClusterSettings, Dtype, KVTransport, Role, RouterSettings, WorkerSettings
from segue.errors import ConfigError, DeadlineExceeded, SegueError
from segue.models.store import ModelHandle, resolve
from segue.paths import logs_dir

START_LIMIT_S = 120.0
_STOP_S = 5.0
_BETWEEN_LOOKS_S = 0.05
_WORKER_COMMAND = (sys.executable, "-m", "deploy.worker")


@dataclass(slots=True)
class LocalWorker:
    """One worker process; a new `process`, of a new pid, after each restart."""

    settings: WorkerSettings
    process: Child
    said: FirstWord
    # Where its WorkerService listens, host:port; empty until it serves.
    address: str = ""

    @property
    def worker_id(self) -> str:
        return self.settings.worker_id

    @property
    def roles(self) -> tuple[Role, ...]:
        return self.settings.roles

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        return not self.process.exited.done()


class LocalCluster:
    """`async with LocalCluster(model) as cluster`: serves until the block ends.

    `model` is a directory or anything else that `segue up --model` takes. Colocated, max(prefill, decode) workers have both
    roles. `threads` is each worker's number of compute threads. Without `redis_url` an embedded Valkey is started.
    `worker_settings` and `router_settings` set further fields of WorkerSettings and RouterSettings.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        prefill: int = 1,
        decode: int = 1,
        colocated: bool = False,
        dtype: Dtype = "float32",
        kv_transport: KVTransport = "auto",
        kv_memory: int | str = "128MiB",
        threads: int = 1,
        redis_url: str | None = None,
        worker_settings: Mapping[str, Any] | None = None,
        router_settings: Mapping[str, Any] | None = None,
    ) -> None:
        flags = {
            "model": str(model),
            "prefill": prefill,
            "decode": decode,
            "colocated": colocated,
            "dtype": dtype,
            "kv_transport": kv_transport,
            "kv_memory": kv_memory,
            "threads": threads,
            "http_port": 0,
            "grpc_port": 0,
            # What is measured and tested is the hand-over, unless told otherwise.
            "disaggregate": "always",
        }
        self._settings = ClusterSettings.load(flags=flags, env={})
        self._worker_settings = worker_settings or {}
        self._router_settings = router_settings or {}
        self._stack = AsyncExitStack()
        self._router: RouterProcess | None = None
        self._workers: dict[str, LocalWorker] = {}
        self.cluster_id = secrets.token_hex(4)
        self.redis_url = redis_url or ""
        # A folder with one log for each process.
        self.logs = logs_dir() / f"local-{self.cluster_id}"

    @property
    def router(self) -> RouterProcess:
        if self._router is None:
            raise RuntimeError("the cluster was not entered")
        return self._router

    @property
    def grpc_address(self) -> str:
        return self.router.grpc

    @property
    def http_address(self) -> str:
        return self.router.http

    @property
    def workers(self) -> list[LocalWorker]:
        """All that were planned, whether they live or not."""
        return list(self._workers.values())

    def worker(self, worker_id: str) -> LocalWorker:
        """Raises ConfigError for a name that no worker has."""
        if worker_id not in self._workers:
            raise ConfigError(f"no worker {worker_id!r}; there are: {', '.join(self._workers)}")
        return self._workers[worker_id]

    async def __aenter__(self) -> Self:
        """Raises what went wrong with whichever part failed first."""
        try:
            async with asyncio.timeout(START_LIMIT_S):
                await self._start()
                await self.wait_ready()
        except BaseException as error:
            await self._stack.aclose()
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded(self._with_logs(f"the cluster did not start within {START_LIMIT_S:.0f} s")) from None
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def kill(self, worker_id: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends the signal and waits until the process has ended; a worker that is told to drain may take a while."""
        worker = self.worker(worker_id)
        worker.process.signal(number)
        await asyncio.shield(worker.process.exited)

    async def restart(self, worker_id: str) -> None:
        """Starts a worker again, killing it first if it still runs, and waits until it serves."""
        await self.kill(worker_id)
        await self._start_worker(self.worker(worker_id).settings)
        await self._until_serving(self.worker(worker_id))

    async def wait_ready(self, timeout_s: float = START_LIMIT_S) -> None:
        """Waits until the router sees every live worker as ready and an end-to-end canary went through.

        Raises DeadlineExceeded, with the end of every log, after `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s), AsyncClient(self.grpc_address) as client:
                await self._until_linked(client)
                await until_ready(self.http_address)
        except TimeoutError:
            raise DeadlineExceeded(self._with_logs(f"the cluster was not ready within {timeout_s:.0f} s")) from None

    async def _until_linked(self, client: AsyncClient) -> None:
        # By pid: the router may still list a worker as it was before its restart.
        while True:
            missing = {worker.pid for worker in self.workers if worker.is_alive} - await _ready_pids(client)
            if not missing:
                return
            # The router can be asked but not awaited.
            await asyncio.sleep(_BETWEEN_LOOKS_S)

    async def _start(self) -> None:
        if not self.redis_url:
            valkey = await self._stack.enter_async_context(embedded_valkey(self.logs / "valkey.log"))
            self.redis_url = valkey.url
        model = await in_daemon_thread(lambda: resolve(self._settings.model))
        await in_daemon_thread(lambda: ensure_ready(model, self._settings, lambda _message, _share: None))
        self._stack.push_async_callback(self._stop_workers)
        for settings in self._plan_workers(model):
            await self._start_worker(settings)
        router = plan_router(self._settings, cluster_id=self.cluster_id, redis=self.redis_url, model=model)
        router = RouterSettings.model_validate(router.model_dump() | dict(self._router_settings))
        self._router = await RouterProcess.start(router, self.logs / "router.log")
        self._stack.push_async_callback(self._router.stop)
        await all_of(self._router.serving(), *map(self._until_serving, self.workers))

    def _plan_workers(self, model: ModelHandle) -> list[WorkerSettings]:
        planned = plan_workers(
            self._settings, cluster_id=self.cluster_id, redis=self.redis_url, model=model, num_cores=self._settings.threads
        )
        further = dict(self._worker_settings)
        return [WorkerSettings.model_validate(settings.model_dump() | further) for settings in planned]

    async def _start_worker(self, settings: WorkerSettings) -> None:
        said = FirstWord()
        # The numeric libraries read this when they are loaded, before the worker says how many threads it wants.
        env = settings.to_env() | {"OMP_NUM_THREADS": str(settings.threads)}
        log = self.logs / f"{settings.worker_id}.log"
        process = await Child.start(settings.worker_id, _WORKER_COMMAND, log=log, env=env, on_line=said.on_line)
        self._workers[settings.worker_id] = LocalWorker(settings, process, said)

    async def _until_serving(self, worker: LocalWorker) -> None:
        event = await worker.said.of(worker.process)
        worker.address = str(event["grpc"])

    async def _stop_workers(self) -> None:
        """All at once: each gets SIGTERM, and SIGKILL if it is still there a while later."""
        await asyncio.gather(*(worker.process.stop(_STOP_S) for worker in self.workers))

    def _with_logs(self, problem: str) -> str:
        tails = [f"{log.name}:\n{log_tail(log)}" for log in sorted(self.logs.glob("*.log"))]
        return "\n".join([f"{problem}; logs in {self.logs}", *tails])


async def _ready_pids(client: AsyncClient) -> set[int]:
    try:
        return {worker.pid for worker in (await client.status()).workers if worker.state == "ready"}
    except SegueError as error:
        if not error.retryable:
            raise
        return set()
