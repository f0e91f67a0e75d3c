"""Starts a whole cluster, and leaves nothing of it behind.

    Valkey → model → Ray with the workers ∥ router → every worker announced → /ready

What is started is pushed on one exit stack and undone in reverse, whether the block ends, the start fails or it is cancelled:
router (clients see their streams end), workers (SIGTERM, so that they leave the membership), Ray, Valkey, folders.
A launcher that is killed needs no clean-up: the kernel ends its children (deploy.tether), and Ray's processes end with theirs.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from deploy.calibrated import ensure_ready
from deploy.child import Child, log_tail
from deploy.cluster import Cluster
from deploy.driver_events import DriverEvents
from deploy.plan import check_model, check_settings, plan_driver, plan_router, plan_workers
from deploy.probe import own_tls, until_ready
from deploy.processes import usable_cores
from deploy.progress import Report, Stage, silent
from deploy.ray_cluster import ray_cluster
from deploy.replica import num_starts, worker_log
from deploy.router_process import ROUTER_COMMAND
from deploy.routers import Routers
from deploy.valkey import embedded_valkey
from deploy.waiting import all_of, in_daemon_thread
from segue.client import Access
from segue.cluster_secret import new_secret
from segue.config import ClusterSettings, WorkerSettings
from segue.errors import ConfigError, DeadlineExceeded, InternalError
from segue.membership import Membership
from segue.models.store import ModelHandle, resolve
from segue.paths import logs_dir
from segue.pools import PoolStore
from segue.runtime import background

# A large model on a slow disk takes minutes to load.
START_LIMIT_S = 600.0
_READY_LIMIT_S = 60.0
_LOOK_AT_LEAST_EVERY_S = 0.5
# Ray starts a process that died again, for ever; a worker that dies this often before it serves never will.
_MAX_STARTS = 3
_KEPT_RUNS = 20


@dataclass(frozen=True, slots=True)
class Programs:
    """What the launcher runs, so that tests can run something lighter."""

    router: Sequence[str] = ROUTER_COMMAND
    # "module:coroutine function", given WorkerSettings.
    worker: str = "deploy.worker:run_worker"


class Launch:
    """`async with Launch(settings) as cluster`: a cluster that serves, until the block ends.

    Entering raises what went wrong with whichever part failed first: ConfigError, ModelFileError, StoreUnavailable, Unavailable
    (no Ray), DeadlineExceeded, or InternalError with the end of the log of a process that died.
    """

    def __init__(self, settings: ClusterSettings, report: Report = silent, programs: Programs = Programs()) -> None:
        # Without one of its user's, a cluster has one of its own in each life.
        self._settings = settings.model_copy(update={"cluster_secret": settings.cluster_secret or new_secret()})
        self._report = report
        self._programs = programs
        self._stack = AsyncExitStack()
        # What workers wait for that Ray has no room for.
        self._missing_room = ""

    async def __aenter__(self) -> Cluster:
        try:
            async with asyncio.timeout(START_LIMIT_S):
                return await self._start()
        except BaseException as error:
            await self._stack.aclose()
            if isinstance(error, TimeoutError):
                why = f": {self._missing_room}" if self._missing_room else ""
                raise DeadlineExceeded(
                    f"the cluster did not start within {START_LIMIT_S:.0f} s{why}; logs: {logs_dir()}"
                ) from None
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start(self) -> Cluster:
        settings, enter = self._settings, self._stack.enter_async_context
        check_settings(settings)
        cluster_id = settings.cluster_id or secrets.token_hex(4)
        logs = _new_log_folder(cluster_id)
        redis, valkey = await self._start_store(logs)
        membership = await enter(Membership(redis, cluster_id))
        # A store that does not answer is told now. What an earlier life of the cluster left behind is there until it lapses.
        earlier = {record.worker_id: record.epoch for record in await membership.list_workers()}
        self._report(Stage("store", "done", "embedded Valkey" if valkey else "the given Redis"))
        settings = await self._scaled(settings, redis, cluster_id)
        model = await self._resolve_model()
        check_model(settings, model)
        workers = plan_workers(settings, cluster_id=cluster_id, redis=redis, model=model, num_cores=usable_cores())
        driver_plan = plan_driver(settings, workers, cluster_id=cluster_id, entry=self._programs.worker)
        events = DriverEvents()
        driver = await enter(ray_cluster(driver_plan, logs / "ray.log", events.on_line))
        planned = [
            plan_router(settings, cluster_id=cluster_id, redis=redis, model=model, number=number)
            for number in range(settings.routers)
        ]
        routers = Routers(planned, logs, self._programs.router)
        cluster = Cluster(
            cluster_id, model, logs, membership=membership, routers=routers, driver=driver, driver_events=events, valkey=valkey
        )
        self._stack.push_async_callback(cluster.stop_workers)
        self._stack.push_async_callback(routers.stop)
        await routers.start()
        async with background(_fail_when_it_exits(driver), events.raise_failures()):
            await all_of(
                self._until_ray_serves(cluster), self._until_announced(cluster, workers, earlier), self._until_routed(cluster)
            )
            await self._until_ready(cluster)
        return cluster

    async def _start_store(self, logs: Path) -> tuple[str, Child | None]:
        """The store's URL, and the embedded Valkey unless one was given."""
        self._report(Stage("store", "running", "starting"))
        if self._settings.redis is not None:
            return self._settings.redis, None
        valkey = await self._stack.enter_async_context(embedded_valkey(logs / "valkey.log"))
        return valkey.url, valkey.child

    async def _scaled(self, settings: ClusterSettings, redis: str, cluster_id: str) -> ClusterSettings:
        """With as many workers as segue scale asked for in an earlier life of the cluster."""
        async with PoolStore(redis, cluster_id) as pools:
            wanted = await pools.wanted()
        if wanted is None or settings.colocated:
            return settings
        self._report(
            Stage("store", "done", f"segue scale asked for prefill={wanted.prefill} decode={wanted.decode}, which holds")
        )
        return settings.model_copy(update={"prefill": wanted.prefill, "decode": wanted.decode})

    async def _resolve_model(self) -> ModelHandle:
        loop = asyncio.get_running_loop()

        def progress(message: str, share: float) -> None:
            loop.call_soon_threadsafe(self._report, Stage("model", "running", message, share))

        self._report(Stage("model", "running", self._settings.model))
        model = await in_daemon_thread(lambda: resolve(self._settings.model, progress))
        await in_daemon_thread(lambda: ensure_ready(model, self._settings, progress))
        self._report(Stage("model", "done", f"{model.name} at {model.path}"))
        return model

    async def _until_ray_serves(self, cluster: Cluster) -> None:
        self._report(Stage("ray", "running", "starting" if self._settings.ray_address is None else "connecting"))
        event = await cluster.driver_events.first_word.of(cluster.driver)
        self._report(Stage("ray", "done", str(event["address"])))

    async def _until_routed(self, cluster: Cluster) -> None:
        self._report(Stage("router", "running", "starting"))
        await cluster.routers.serving()
        self._report(Stage("router", "done", f"http {cluster.http}, grpc {cluster.grpc}"))

    async def _until_announced(self, cluster: Cluster, workers: Sequence[WorkerSettings], earlier: Mapping[str, int]) -> None:
        """In later epochs than the `earlier` ones."""
        wanted = {worker.worker_id for worker in workers}
        shown = ""
        async for _ in cluster.membership.changes(_LOOK_AT_LEAST_EVERY_S):
            records = await cluster.membership.list_workers()
            announced = wanted & {one.worker_id for one in records if one.epoch > earlier.get(one.worker_id, -1)}
            self._missing_room = cluster.driver_events.problem
            if (state := _state_of(announced, wanted, self._missing_room)) != shown:
                shown = state
                self._report(Stage("workers", "running", state, len(announced) / len(wanted)))
            if announced == wanted:
                break
            _check_starts(cluster.id, wanted - announced)
        self._report(Stage("workers", "done", ", ".join(sorted(announced))))

    async def _until_ready(self, cluster: Cluster) -> None:
        access = Access.from_env()
        if self._settings.tls_client_ca is not None and access.cert is None:
            self._report(
                Stage("ready", "done", "not asked: clients need a certificate; SEGUE_CLIENT_CERT gives the launcher one")
            )
            return
        self._report(Stage("ready", "running", "sending a canary request"))
        try:
            async with asyncio.timeout(_READY_LIMIT_S):
                await until_ready(cluster.http, own_tls(self._settings, access))
        except TimeoutError:
            log = cluster.routers.processes[0].child.log
            raise DeadlineExceeded(
                f"every worker serves, but http://{cluster.http}/ready did not say so within {_READY_LIMIT_S:.0f} s; "
                f"the end of the router's log, {log}:\n{log_tail(log)}"
            ) from None
        self._report(Stage("ready", "done", "a canary request went all the way"))


def _state_of(announced: set[str], wanted: set[str], problem: str) -> str:
    state = f"{len(announced)} of {len(wanted)} serve"
    names = f": {', '.join(sorted(announced))}" if announced else ""
    return f"{state}{names}; {problem}" if problem else state + names


def _check_starts(cluster_id: str, worker_ids: set[str]) -> None:
    for worker_id in sorted(worker_ids):
        log = worker_log(cluster_id, worker_id)
        if (starts := num_starts(log)) >= _MAX_STARTS:
            raise InternalError(
                f"{worker_id} died {starts - 1} times while it started; the end of its log, {log}:\n{log_tail(log)}"
            )


async def _fail_when_it_exits(child: Child) -> None:
    await asyncio.shield(child.exited)
    raise child.died()


def _new_log_folder(cluster_id: str) -> Path:
    """Makes room first: the logs of the latest runs are kept, those of this cluster's earlier lives among them."""
    runs = sorted((path for path in logs_dir().glob("*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for run in runs[: 1 - _KEPT_RUNS]:
        shutil.rmtree(run, ignore_errors=True)
    folder = logs_dir() / cluster_id
    try:
        if folder.exists():
            folder.rename(folder.with_name(f"{cluster_id}.{folder.stat().st_mtime_ns}"))
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot write logs to {folder}: {error.strerror}; set SEGUE_HOME to another folder") from None
    return folder
