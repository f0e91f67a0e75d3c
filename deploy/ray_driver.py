"""`python -m deploy.ray_driver`: the process that owns Ray, and through it every worker replica.

A process of its own: Ray's settings, threads, signal handlers and output stay out of the launcher, several clusters can run
side by side, and whatever happens to the launcher, this process ends and Ray ends with it. Its plan comes as JSON on stdin;
what it has to say goes to stdout as JSON lines: `serving` once Ray runs, then `replica_ended` for each replica that returned.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from deploy.replica import Outcome, Replica
from deploy.scaling import Scaling
from segue.config import WorkerSettings
from segue.membership import Membership
from segue.pools import PoolStore
from segue.runtime import background, stop_event

_OBJECT_STORE_BYTES = 80 * 2**20
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
# A resource of the local Ray, of which every actor takes one and there is always enough: the cores there are do not limit how
# many workers share them.
_SLOT, _NUM_SLOTS = "segue_slot", 10_000
_HELPERS = ("start_monitor", "start_log_monitor", "start_api_server")


@dataclass(frozen=True, slots=True)
class DriverPlan:
    """What to run. `ray_address` empty: a local Ray with its files in `temp_dir`."""

    cluster_id: str
    ray_address: str
    # "module:coroutine function", given WorkerSettings.
    entry: str
    # WorkerSettings as JSON, one for each replica.
    workers: tuple[str, ...]
    # Over the nodes of a Ray cluster: a worker is then reached at the address of the node that it lands on.
    spread: bool
    temp_dir: str = ""
    # Custom resources of the nodes that each role's actors are for, and how much one takes.
    prefill_resources: dict[str, float] = field(default_factory=dict)
    decode_resources: dict[str, float] = field(default_factory=dict)

    def with_temp_dir(self, temp_dir: str) -> DriverPlan:
        return replace(self, temp_dir=temp_dir)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DriverPlan:
        values = json.loads(text)
        return cls(**{**values, "workers": tuple(values["workers"])})

    def worker_settings(self) -> list[WorkerSettings]:
        return [WorkerSettings.model_validate_json(text) for text in self.workers]


def say(event: str, **values: str | bool) -> None:
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


class Supervisor:
    """Starts each replica and brings back those that ended without having been told to.

    A replica is one actor, or one for each of its tensor-parallel ranks, in one placement group. Ray itself starts a lone actor
    again that died. Ranks are of no use without each other: when one ends, whichever way, the others are ended as well, and all
    start anew. Implements deploy.scaling.Replicas.
    """

    def __init__(self, ray: Any, plan: DriverPlan) -> None:
        self._ray = ray
        self._plan = plan
        self._workers = plan.worker_settings()
        # By worker id, until the replica has left for good.
        self._tasks: dict[str, asyncio.Task[None]] = {}
        # Those for which Ray has found room.
        self._placed: set[str] = set()

    async def run(self) -> None:
        """Until SIGTERM; every replica is then ended."""
        stop = stop_event()
        for worker in self._workers:
            self._keep(worker)
        say("serving", address=self._ray.get_runtime_context().gcs_address)
        try:
            async with self._scaling():
                await stop.wait()
        finally:
            for worker_id in self.running:
                self.end(worker_id)
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    @asynccontextmanager
    async def _scaling(self) -> AsyncIterator[None]:
        """Follows what operators ask for. A colocated cluster has one pool, which nobody can ask for."""
        first = self._workers[0]
        if len(first.roles) > 1:
            yield
            return
        async with (
            Membership(first.redis, first.cluster_id) as membership,
            PoolStore(first.redis, first.cluster_id) as store,
            background(Scaling(self, membership, store, first.secret).run()),
        ):
            yield

    @property
    def running(self) -> Collection[str]:
        return tuple(self._tasks)

    def start(self, worker_id: str) -> None:
        """As the plan's workers of that role are."""
        self._keep(self._like(worker_id).model_copy(update={"worker_id": worker_id}))

    def _like(self, worker_id: str) -> WorkerSettings:
        """A worker of the plan that has the role of this one."""
        role = worker_id.partition("-")[0]
        return next(worker for worker in self._workers if role in worker.roles)

    def _keep(self, worker: WorkerSettings) -> None:
        task = self._tasks[worker.worker_id] = asyncio.create_task(self._supervise(worker))
        task.add_done_callback(lambda _: self._tasks.pop(worker.worker_id))

    def end(self, worker_id: str) -> None:
        self._tasks[worker_id].cancel()

    def what_is_missing(self, worker_ids: Iterable[str]) -> str:
        waiting = [worker_id for worker_id in worker_ids if worker_id in self._tasks and worker_id not in self._placed]
        if not waiting:
            return ""
        takes = self._resources(self._like(waiting[0]))
        try:
            free = self._ray.available_resources()
        except self._ray.exceptions.RayError:  # its head does not answer
            return ""
        return (
            f"Ray has no room yet for {', '.join(waiting)}: a rank of {waiting[0]} takes {_amounts(takes)}, and free in the "
            f"whole cluster are {_amounts({name: free.get(name, 0) for name in takes})}"
        )

    async def _supervise(self, worker: WorkerSettings) -> None:
        """Until the replica left for good."""
        worker = worker.model_copy(update={"threads": worker.threads or self._fair_threads()})
        pause_s = _FIRST_PAUSE_S
        while True:
            started_s = time.monotonic()
            outcome = await (self._run_alone(worker) if worker.num_ranks == 1 else self._run_ranks(worker))
            say("replica_ended", worker_id=worker.worker_id, **outcome)
            if not outcome["again"]:
                return
            if outcome["drained"]:
                continue
            if time.monotonic() - started_s > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _run_alone(self, worker: WorkerSettings) -> Outcome:
        """Until its run returns; Ray restarts a process that died."""
        strategy = "SPREAD" if self._plan.spread else "DEFAULT"
        actor = self._start(worker, max_restarts=-1, max_task_retries=-1, scheduling_strategy=strategy)
        placing = asyncio.create_task(self._note_placed(worker, actor))
        try:
            return await self._outcome(actor.run.remote(self._plan.entry))
        finally:
            placing.cancel()
            self._placed.discard(worker.worker_id)
            self._ray.kill(actor)

    async def _note_placed(self, worker: WorkerSettings, actor: Any) -> None:
        with suppress(self._ray.exceptions.RayError):
            await actor.__ray_ready__.remote()
            self._placed.add(worker.worker_id)

    async def _run_ranks(self, worker: WorkerSettings) -> Outcome:
        """Until the first of them ends; then none is left."""
        # Named anew each time: no rank of an earlier start is let in.
        worker = worker.model_copy(update={"group": secrets.token_hex(8)})
        bundles = [self._resources(worker)] * worker.num_ranks
        placement = self._ray.util.placement_group(bundles, strategy="STRICT_PACK")
        actors: list[Any] = []
        runs: list[asyncio.Task[Outcome]] = []
        try:
            await placement.ready()
            self._placed.add(worker.worker_id)
            for rank in range(worker.num_ranks):
                strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                    placement, placement_group_bundle_index=rank
                )
                settings = worker.model_copy(update={"rank": rank})
                actors.append(self._start(settings, max_restarts=0, max_task_retries=0, scheduling_strategy=strategy))
            runs += [asyncio.create_task(self._outcome(actor.run.remote(self._plan.entry))) for actor in actors]
            done, _ = await asyncio.wait(runs, return_when=asyncio.FIRST_COMPLETED)
            outcome = done.pop().result()
            # The others end with rank 0, which alone knows what comes next.
            return await runs[0] if outcome["drained"] else outcome
        finally:
            self._placed.discard(worker.worker_id)
            for run in runs:
                run.cancel()
            for actor in actors:
                self._ray.kill(actor)
            self._ray.util.remove_placement_group(placement)

    async def _outcome(self, run: Any) -> Outcome:
        try:
            outcome: Outcome = await run
        except self._ray.exceptions.RayError as error:  # a defect in the worker, or its process is gone
            return Outcome(drained=False, again=True, code="internal", error=str(error))
        return outcome

    def _fair_threads(self) -> int:
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)) // sum(worker.num_ranks for worker in self._workers))

    def _start(self, worker: WorkerSettings, **options: Any) -> Any:
        resources = self._resources(worker)
        num_cpus, num_gpus = resources.pop("CPU", 0), resources.pop("GPU", 0)
        make = self._ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, resources=resources, max_concurrency=1, **options)(
            Replica
        )
        return make.remote(worker.model_dump_json(), self._plan.spread)

    def _resources(self, worker: WorkerSettings) -> dict[str, float]:
        """Of one actor. On a real cluster they take the cores that they keep busy."""
        if not self._plan.ray_address:
            return {_SLOT: 1.0, **_gpus(worker)}
        custom = self._plan.decode_resources if worker.only_decodes else self._plan.prefill_resources
        threads = worker.threads or self._fair_threads()
        return custom | {"CPU": threads if self._plan.spread else 1} | _gpus(worker)


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _gpus(worker: WorkerSettings) -> dict[str, int]:
    """Ranks must not share a GPU; Ray lets each see its own alone. Not run on hardware."""
    return {"GPU": 1} if worker.device == "cuda" and worker.num_ranks > 1 else {}


def init_ray(ray: Any, plan: DriverPlan) -> None:
    workers = plan.worker_settings()
    common = {"namespace": f"segue-{plan.cluster_id}", "log_to_driver": False, "logging_level": "warning"}
    if plan.ray_address:
        ray.init(address=plan.ray_address, **common)
        return
    with _without_helpers(ray):
        ray.init(
            address="local",
            # So many processes are begun at once, to become the actors.
            num_cpus=sum(worker.num_ranks for worker in workers),
            resources={_SLOT: _NUM_SLOTS},
            num_gpus=sum(worker.num_ranks * _gpus(worker).get("GPU", 0) for worker in workers),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=plan.temp_dir,
            **common,
        )


@contextmanager
def _without_helpers(ray: Any) -> Iterator[None]:
    """Leaves out what a Ray of one host has no use for: autoscaler, log collector, and the API server that remains of the
    dashboard without a dashboard, for which ray.init waits. It has no switch for them. A Ray in which these names are others
    starts them, and is only slower; test_launch tells of it."""
    node = ray._private.node.Node  # noqa: SLF001
    kept = {name: getattr(node, name) for name in _HELPERS if hasattr(node, name)}
    for name in kept:
        setattr(node, name, _start_nothing)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(node, name, method)


def _start_nothing(_node: Any, **_: Any) -> None:
    pass


def main() -> int:
    plan = DriverPlan.from_json(sys.stdin.read())
    import ray
    import ray.util.scheduling_strategies

    try:
        init_ray(ray, plan)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where, advice = "on this machine", "segue doctor may tell more"
        if plan.ray_address:
            where, advice = (
                f"at {plan.ray_address}",
                "does it run, and are RAY_AUTH_MODE and RAY_AUTH_TOKEN those of the cluster?",
            )
        say("failed", code="unavailable", error=f"no Ray {where}: {error}; {advice}")
        return 1
    try:
        asyncio.run(Supervisor(ray, plan).run())
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
