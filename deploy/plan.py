"""What a cluster consists of, decided from its settings alone."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Any

from deploy.driver_plan import DriverPlan
from segue.config import (
    LOOPBACK_NAMES,
    ClusterSettings,
    DoorSettings,
    EngineSettings,
    ObservabilitySettings,
    Role,
    RouterSettings,
    WorkerSettings,
)
from segue.errors import ConfigError
from segue.models.config import ModelConfig
from segue.models.store import ModelHandle
from segue.pools import pool_roles


def worker_names(settings: ClusterSettings) -> dict[str, tuple[Role, ...]]:
    """Worker ids and their roles. Colocated, one worker stands for a prefill and a decode worker."""
    if settings.colocated:
        return {f"worker-{i}": ("prefill", "decode") for i in range(max(settings.prefill, settings.decode))}
    return pool_roles(settings.prefill, settings.decode)


def num_processes(settings: ClusterSettings) -> int:
    """Of all workers, each rank one."""
    names = worker_names(settings).values()
    return sum(settings.decode_tp if roles == ("decode",) else settings.prefill_tp for roles in names)


def plan_workers(
    settings: ClusterSettings, *, cluster_id: str, redis: str, model: ModelHandle, num_cores: int
) -> list[WorkerSettings]:
    """`num_cores` of this host are shared out among the workers, unless they run elsewhere: then threads stay 0, and
    the node that a worker lands on decides."""
    names = worker_names(settings)
    engine = settings.model_dump(include=set(EngineSettings.model_fields))
    if not is_spread(settings):
        engine["threads"] = settings.threads or max(1, num_cores // num_processes(settings))
    return [
        WorkerSettings(
            **engine,
            **_observability(settings),
            cluster_id=cluster_id,
            cluster_secret=settings.cluster_secret,
            redis=redis,
            worker_id=worker_id,
            roles=roles,
            model_dir=model.path,
            model_name=model.name,
        )
        for worker_id, roles in names.items()
    ]


def plan_router(
    settings: ClusterSettings, *, cluster_id: str, redis: str, model: ModelHandle, number: int = 0
) -> RouterSettings:
    """Those of the first router may name no ports; the others are given the ports that it then has."""
    door = {name: path.absolute() for name in DoorSettings.model_fields if (path := getattr(settings, name)) is not None}
    return RouterSettings(
        **door,
        **_observability(settings),
        router_id=f"router-{number}",
        shares_ports=settings.routers > 1,
        cluster_id=cluster_id,
        cluster_secret=settings.cluster_secret,
        redis=redis,
        model_dir=model.path,
        model_name=model.name,
        host=settings.host,
        http_port=settings.http_port,
        grpc_port=settings.grpc_port,
        policy=settings.policy,
        disaggregate=settings.disaggregate,
        max_wait_s=settings.max_wait_s,
    )


def _observability(settings: ClusterSettings) -> dict[str, Any]:
    return settings.model_dump(include=set(ObservabilitySettings.model_fields))


def plan_driver(settings: ClusterSettings, workers: list[WorkerSettings], *, cluster_id: str, entry: str) -> DriverPlan:
    return DriverPlan(
        cluster_id=cluster_id,
        ray_address=settings.ray_address or "",
        entry=entry,
        workers=tuple(worker.model_dump_json() for worker in workers),
        spread=is_spread(settings),
        prefill_resources=settings.prefill_resources,
        decode_resources=settings.decode_resources,
    )


def is_spread(settings: ClusterSettings) -> bool:
    """Whether workers may land on other hosts."""
    return settings.ray_address is not None and settings.ray_address.rpartition(":")[0] not in LOOPBACK_NAMES


def check_settings(settings: ClusterSettings) -> None:
    """What can be known to fail before anything is started. Raises ConfigError."""
    if settings.colocated and settings.prefill_tp != settings.decode_tp:
        raise ConfigError(
            f"decode_tp: a colocated worker runs both phases on the same ranks, and prefill_tp is {settings.prefill_tp}; "
            "give the same number twice",
            field="decode_tp",
        )
    for name in ("prefill_resources", "decode_resources"):
        if getattr(settings, name) and settings.ray_address is None:
            raise ConfigError(f"{name}: a Ray that is started here has no custom resources; give --ray-address", field=name)
    if is_spread(settings) and settings.redis is None:
        raise ConfigError(
            "ray_address: workers on other hosts cannot reach the embedded Valkey, which listens on loopback only; "
            "give --redis with the URL of a Redis that they can reach"
        )
    for field, port in (("http_port", settings.http_port), ("grpc_port", settings.grpc_port)):
        if port and not can_listen(settings.host, port):
            raise ConfigError(
                f"{field}: {settings.host}:{port} is taken by another program, maybe another cluster; "
                f"stop it, or choose another with --{field.replace('_', '-')} (0 picks a free one)",
                field=field,
            )


def check_model(settings: ClusterSettings, model: ModelHandle) -> None:
    """Raises ConfigError when the model cannot be cut into as many ranks as are asked for."""
    for field, degree in (("prefill_tp", settings.prefill_tp), ("decode_tp", settings.decode_tp)):
        if degree > 1:
            ModelConfig.from_dir(model.path).check_tensor_parallel(degree, field)


def can_listen(host: str, port: int) -> bool:
    """False if the port is taken. A host name or address that cannot be looked up is left for the router to refuse."""
    with suppress(socket.gaierror):
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError:
                return False
    return True
