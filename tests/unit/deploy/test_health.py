"""What a worker says of itself to whoever watches its process, and the command that asks."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import grpc.aio
import pytest
import trustme
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.health import complaint
from deploy.worker_health import LIVENESS, STUCK_STEP_S, health_served

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class FakeWorker:
    def __init__(self) -> None:
        self.engine = SimpleNamespace(step_times=SimpleNamespace(age_s=0.0))
        self.draining = False
        self.address = ""

    async def status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        async with grpc.aio.insecure_channel(self.address) as channel:
            response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
            return response.status

    async def complaint(self) -> str:
        host, _, port = self.address.rpartition(":")
        return await asyncio.to_thread(complaint, {"SEGUE_ROLES": "decode", "SEGUE_HOST": host, "SEGUE_HEALTH_PORT": port})


@asynccontextmanager
async def fake_worker() -> AsyncIterator[FakeWorker]:
    worker = FakeWorker()
    async with health_served("127.0.0.1", 0, worker.engine, lambda: worker.draining) as worker.address:  # type: ignore[arg-type]
        yield worker


async def test_a_draining_worker_is_alive_and_not_ready() -> None:
    async with fake_worker() as worker:
        assert [await worker.status(""), await worker.status(LIVENESS)] == [SERVING, SERVING]
        worker.draining = True
        assert [await worker.status(""), await worker.status(LIVENESS)] == [NOT_SERVING, SERVING]


async def test_a_worker_whose_step_never_ends_is_not_alive() -> None:
    async with fake_worker() as worker:
        worker.engine.step_times.age_s = STUCK_STEP_S - 1
        assert await worker.status(LIVENESS) == SERVING
        assert await worker.complaint() == ""
        worker.engine.step_times.age_s = STUCK_STEP_S
        assert await worker.status(LIVENESS) == NOT_SERVING
        assert await worker.complaint() == f"{worker.address}: NOT_SERVING"


async def test_an_unknown_service_is_named() -> None:
    async with fake_worker() as worker:
        with pytest.raises(grpc.aio.AioRpcError, match="no service 'other'"):
            await worker.status("other")


@pytest.mark.parametrize("over_tls", [False, True])
async def test_the_command_asks_a_router(tmp_path: Path, over_tls: bool) -> None:
    status = 200

    async def health(_request: web.Request) -> web.Response:
        return web.Response(status=status, text="said")

    application = web.Application()
    application.add_routes([web.get("/health", health)])
    runner = web.AppRunner(application)
    await runner.setup()
    files, tls = {}, None
    if over_tls:
        # For a name that is not the one it is asked by.
        issued = trustme.CA().issue_cert("segue.example")
        files = {"SEGUE_TLS_CERT": str(tmp_path / "cert.pem"), "SEGUE_TLS_KEY": str(tmp_path / "key.pem")}
        issued.private_key_pem.write_to_path(files["SEGUE_TLS_KEY"])
        issued.cert_chain_pems[0].write_to_path(files["SEGUE_TLS_CERT"])
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        issued.configure_cert(tls)
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls).start()
    env = files | {"SEGUE_HOST": "0.0.0.0", "SEGUE_HTTP_PORT": str(runner.addresses[0][1])}
    assert await asyncio.to_thread(complaint, env) == ""
    status = 500
    assert await asyncio.to_thread(complaint, env) == "status 500: said"
    await runner.cleanup()
    assert (await asyncio.to_thread(complaint, env)).startswith("status 0: ")
