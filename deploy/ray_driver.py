"""`python -m deploy.ray_driver`: the process that owns Ray, and through it every worker replica.

A process of its own: Ray's settings, threads, signal handlers and output stay out of the launcher, several clusters can run
side by side, and whatever happens to the launcher, this process ends and Ray ends with it. Its plan comes as JSON on stdin;
what it has to say goes to stdout as JSON lines: `serving` once Ray runs, then `replica_ended` for each replica that returned,
and `room` with what workers wait for, when that changes: empty once all have a place.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn

from deploy.driver_plan import DriverPlan
from deploy.ray_start import init_ray
from deploy.replica import Outcome, Replica
from deploy.room import Demand, never_fits, not_free, rank_resources
from deploy.scaling import Scaling
from segue.config import WorkerSettings
from segue.membership import Membership
from segue.pools import PoolStore
from segue.runtime import background, stop_event

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
# Ray needs a moment to start an actor that it has room for.
_PATIENCE_S = 5.0
_LOOK_EVERY_S = 0.5


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
        # Those for which Ray has not found room yet, since when, on the monotonic clock.
        self._unplaced_since_s: dict[str, float] = {}

    async def run(self) -> None:
        """Until SIGTERM; every replica is then ended."""
        stop = stop_event()
        for worker in self._workers:
            self._keep(worker)
        say("serving", address=self._ray.get_runtime_context().gcs_address)
        try:
            async with self._scaling(), background(self._tell_of_room()):
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

    async def _tell_of_room(self) -> NoReturn:
        told = ""
        while True:
            if (problem := self.what_is_missing(self.running)) != told:
                say("room", problem=problem)
                told = problem
            await asyncio.sleep(_LOOK_EVERY_S)

    def what_is_missing(self, worker_ids: Iterable[str]) -> str:
        """What is short in the whole cluster is told at once; what may be free in a moment, after a while."""
        waiting = [worker_id for worker_id in worker_ids if worker_id in self._unplaced_since_s]
        if not waiting:
            return ""
        try:
            free, total = self._ray.available_resources(), self._ray.cluster_resources()
        except self._ray.exceptions.RayError:  # its head does not answer
            return ""
        problem = never_fits([self._demand(worker_id) for worker_id in self.running], total)
        if not problem:
            patient_s = time.monotonic() - _PATIENCE_S
            waiting = [worker_id for worker_id in waiting if self._unplaced_since_s[worker_id] < patient_s]
            if not waiting:
                return ""
            problem = not_free(self._demand(waiting[0]), free, total)
        return f"Ray has no room yet for {', '.join(waiting)}: {problem}; add nodes, or ask for fewer workers"

    def _demand(self, worker_id: str) -> Demand:
        worker = self._like(worker_id)
        return Demand(self._resources(worker), worker.num_ranks)

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
        self._unplaced_since_s[worker.worker_id] = time.monotonic()
        # Asked before it runs: it does one thing at a time.
        placing = asyncio.create_task(self._note_placed(worker, actor.__ray_ready__.remote()))
        try:
            return await self._outcome(actor.run.remote(self._plan.entry))
        finally:
            placing.cancel()
            self._unplaced_since_s.pop(worker.worker_id, None)
            self._ray.kill(actor)

    async def _note_placed(self, worker: WorkerSettings, ready: Any) -> None:
        with suppress(self._ray.exceptions.RayError):
            await ready
            self._unplaced_since_s.pop(worker.worker_id, None)

    async def _run_ranks(self, worker: WorkerSettings) -> Outcome:
        """Until the first of them ends; then none is left."""
        # Named anew each time: no rank of an earlier start is let in.
        worker = worker.model_copy(update={"group": secrets.token_hex(8)})
        bundles = [self._resources(worker)] * worker.num_ranks
        placement = self._ray.util.placement_group(bundles, strategy="STRICT_PACK")
        actors: list[Any] = []
        runs: list[asyncio.Task[Outcome]] = []
        self._unplaced_since_s[worker.worker_id] = time.monotonic()
        try:
            await placement.ready()
            del self._unplaced_since_s[worker.worker_id]
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
            self._unplaced_since_s.pop(worker.worker_id, None)
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
        """Of one actor."""
        return rank_resources(self._plan, worker, worker.threads or self._fair_threads())


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
