"""grpc.health.v1 of a worker, for whoever watches over its process: a kubelet, a container engine.

service ""             SERVING while the worker takes new sequences; NOT_SERVING once it drains
service "liveness"     SERVING while it computes: NOT_SERVING when one step has taken so long that it will never end

At a port of its own, in plain text: those who watch know no secret of the cluster, and learn none.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from segue.errors import ConfigError

if TYPE_CHECKING:
    # Who asks (deploy.health) does not load it.
    from engine.engine import Engine

LIVENESS = "liveness"
# Routers give such a worker up after two minutes; it gets as long again to come back by itself.
STUCK_STEP_S = 240.0


@asynccontextmanager
async def health_served(host: str, port: int, engine: Engine, is_draining: Callable[[], bool]) -> AsyncIterator[str]:
    """For as long as the block. Yields the address; port 0 is any free one. Raises ConfigError when the port is taken."""
    services = {"": lambda: not is_draining(), LIVENESS: lambda: engine.step_times.age_s < STUCK_STEP_S}
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    health_pb2_grpc.add_HealthServicer_to_server(_HealthServicer(services), server)
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise ConfigError(f"health_port: cannot listen on {host}:{port}: {error}") from None
    await server.start()
    try:
        yield f"{host}:{bound}"
    finally:
        await server.stop(None)


class _HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package has no types
    """Answers checks; nobody watches a worker by Watch, which stays unimplemented."""

    def __init__(self, services: dict[str, Callable[[], bool]]) -> None:
        self._services = services

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[object, object]
    ) -> health_pb2.HealthCheckResponse:
        if (is_fine := self._services.get(request.service)) is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r}; there are '' and {LIVENESS!r}")
        statuses = health_pb2.HealthCheckResponse
        return statuses(status=statuses.SERVING if is_fine() else statuses.NOT_SERVING)
