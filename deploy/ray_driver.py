"""`python -m deploy.ray_driver`: the process that owns Ray, and through it every worker replica.

A process of its own: Ray's settings, threads, signal handlers and output stay out of the launcher, several clusters can run
side by side, and whatever happens to the launcher, this process ends and Ray ends with it. Its plan comes as JSON on stdin;
what it has to say goes to stdout as JSON lines: `serving` once Ray runs, then `replica_ended` for each replica that returned.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

from deploy.replica import Outcome, Replica
from segue.config import WorkerSettings
from segue.runtime import stop_event

_OBJECT_STORE_BYTES = 80 * 2**20
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


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

    def with_temp_dir(self, temp_dir: str) -> DriverPlan:
        return replace(self, temp_dir=temp_dir)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DriverPlan:
        values = json.loads(text)
        return cls(**{**values, "workers": tuple(values["workers"])})


def say(event: str, **values: str | bool) -> None:
    sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
    sys.stdout.flush()


class Supervisor:
    """Starts each replica and brings back those that ended without having been told to."""

    def __init__(self, ray: Any, plan: DriverPlan) -> None:
        self._ray = ray
        self._plan = plan
        self._workers = [WorkerSettings.model_validate_json(text) for text in plan.workers]

    async def run(self) -> None:
        """Until SIGTERM; every replica is then ended."""
        stop = stop_event()
        tasks = [asyncio.create_task(self._supervise(worker)) for worker in self._workers]
        say("serving", address=self._ray.get_runtime_context().gcs_address)
        try:
            await stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _supervise(self, worker: WorkerSettings) -> None:
        """Until the replica drained. Ray restarts a process that died; this restarts a run that gave up."""
        worker = worker.model_copy(update={"threads": worker.threads or self._fair_threads()})
        pause_s = _FIRST_PAUSE_S
        while True:
            actor = self._actor_class(worker.threads).remote(worker.model_dump_json(), self._plan.spread)
            try:
                outcome = await self._outcome(actor.run.remote(self._plan.entry))
            finally:
                self._ray.kill(actor)
            say("replica_ended", worker_id=worker.worker_id, **outcome)
            if outcome["drained"]:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _outcome(self, run: Any) -> Outcome:
        try:
            outcome: Outcome = await run
        except self._ray.exceptions.RayError as error:  # a defect in the worker, or Ray gave the actor up
            return Outcome(drained=False, code="internal", error=str(error))
        return outcome

    def _fair_threads(self) -> int:
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)) // len(self._workers))

    def _actor_class(self, threads: int) -> Any:
        return self._ray.remote(
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=1,
            # A local Ray was given one slot for each worker; on a real cluster a worker takes the cores that it keeps busy.
            num_cpus=threads if self._plan.spread else 1,
            scheduling_strategy="SPREAD" if self._plan.spread else "DEFAULT",
        )(Replica)


def init_ray(ray: Any, plan: DriverPlan) -> None:
    common = {"namespace": f"segue-{plan.cluster_id}", "log_to_driver": False, "logging_level": "warning"}
    if plan.ray_address:
        ray.init(address=plan.ray_address, **common)
    else:
        ray.init(
            address="local",
            num_cpus=len(plan.workers),
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=plan.temp_dir,
            **common,
        )


def main() -> int:
    plan = DriverPlan.from_json(sys.stdin.read())
    import ray

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
