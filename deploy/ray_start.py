"""Starts the Ray of one host, or joins one that runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deploy.driver_plan import DriverPlan
from deploy.room import NUM_SLOTS, SLOT, gpus_of

_OBJECT_STORE_BYTES = 80 * 2**20
_HELPERS = ("start_monitor", "start_log_monitor", "start_api_server")


def init_ray(ray: Any, plan: DriverPlan) -> None:
    """Raises OSError, RuntimeError, ValueError or RayError, as ray.init does."""
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
            resources={SLOT: NUM_SLOTS},
            num_gpus=sum(worker.num_ranks * gpus_of(worker) for worker in workers),
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
