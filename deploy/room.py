"""What workers take of a Ray cluster, and what is said while it has no room for them. Nothing here asks Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploy.driver_plan import DriverPlan
from segue.config import WorkerSettings

# A resource of the local Ray, of which every actor takes one and there is always enough: the cores there are do not limit how
# many workers share them.
SLOT, NUM_SLOTS = "segue_slot", 10_000

# Amounts by name, as Ray counts them.
Resources = Mapping[str, float]


def rank_resources(plan: DriverPlan, worker: WorkerSettings, threads: int) -> dict[str, float]:
    """Of one of the worker's ranks, which keeps so many threads busy. On a real cluster it takes the cores for them."""
    gpus = {"GPU": 1.0} if gpus_of(worker) else {}
    if not plan.ray_address:
        return {SLOT: 1.0, **gpus}
    custom = plan.decode_resources if worker.only_decodes else plan.prefill_resources
    return custom | {"CPU": float(threads if plan.spread else 1)} | gpus


def gpus_of(worker: WorkerSettings) -> int:
    """Of one rank: ranks must not share a GPU, and Ray lets each see its own alone. Not run on hardware."""
    return int(worker.device == "cuda" and worker.num_ranks > 1)


@dataclass(frozen=True, slots=True)
class Demand:
    """What one worker takes."""

    rank: Resources
    num_ranks: int

    def of(self, name: str) -> float:
        return self.rank.get(name, 0.0) * self.num_ranks


def never_fits(demands: Sequence[Demand], total: Resources) -> str:
    """What all workers take that the whole cluster does not have; empty if it has all."""
    lacking = {
        name: needed
        for name in sorted({name for demand in demands for name in demand.rank})
        if (needed := sum(demand.of(name) for demand in demands)) > total.get(name, 0.0)
    }
    if not lacking:
        return ""
    has = _amounts({name: total.get(name, 0.0) for name in lacking})
    return f"all {len(demands)} workers take {_amounts(lacking)}, and the whole cluster has {has}"


def not_free(demand: Demand, free: Resources, total: Resources) -> str:
    """What one worker waits for that would fit in if nobody else was there."""
    parts = ", ".join(f"{free.get(name, 0.0):g} of {total.get(name, 0.0):g} {name}" for name in demand.rank)
    ranks = "it takes" if demand.num_ranks == 1 else f"on one node each of its {demand.num_ranks} ranks takes"
    return f"{ranks} {_amounts(demand.rank)}, and free in the whole cluster are {parts}"


def _amounts(resources: Resources) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
