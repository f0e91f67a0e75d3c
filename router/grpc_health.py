"""grpc.health.v1, told by the same canary as /ready."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router.readiness import Readiness

HEALTH_SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
# Readiness cannot be awaited, only looked at: so often for those who watch.
_WATCH_PERIOD_S = 1.0

_Context = grpc.aio.ServicerContext[object, object]


def add_health(server: grpc.aio.Server, service_name: str, readiness: Readiness) -> None:
    health_pb2_grpc.add_HealthServicer_to_server(_HealthServicer({"", service_name}, readiness), server)


class _HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package has no types
    def __init__(self, service_names: set[str], readiness: Readiness) -> None:
        """The empty name stands for the server as a whole."""
        self._service_names = service_names
        self._readiness = readiness

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._service_names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service {request.service!r} is not served here")
        return await self._response()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: _Context) -> None:  # noqa: N802
        """The status now, and again whenever it has changed."""
        if request.service not in self._service_names:
            await context.write(health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN))
            await asyncio.Event().wait()
        last = None
        while True:
            response = await self._response()
            if response != last:
                await context.write(response)
                last = response
            await asyncio.sleep(_WATCH_PERIOD_S)

    async def _response(self) -> health_pb2.HealthCheckResponse:
        report = await self._readiness.check()
        statuses = health_pb2.HealthCheckResponse
        return statuses(status=statuses.SERVING if report.ready else statuses.NOT_SERVING)
