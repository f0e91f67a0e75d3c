"""grpc.health.v1 of a worker, for whoever watches over its process: a kubelet, a container engine.

service ""             SERVING while the worker takes new sequences; NOT_SERVING once it drains
service "liveness"     SERVING while it computes: NOT_SERVING when one step has taken so long that it will never end
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

if TYPE_CHECKING:
    # Who asks (deploy.health) does not load it.
    from engine.engine import Engine

LIVENESS = "liveness"
# Routers give such a worker up after two minutes; it gets as long again to come back by itself.
STUCK_STEP_S = 240.0


def add_health(server: grpc.aio.Server, engine: Engine, is_draining: Callable[[], bool]) -> None:
    services = {"": lambda: not is_draining(), LIVENESS: lambda: engine.step_age_s < STUCK_STEP_S}
    health_pb2_grpc.add_HealthServicer_to_server(_HealthServicer(services), server)


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
