"""A real router over fake workers, for what only the router decides."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.fake_workers import FakePlan, fake_workers
from bench.tiny_model import make_tiny_model
from deploy.child import Child
from deploy.router_process import RouterProcess
from deploy.valkey import embedded_valkey
from segue.client import Access, AsyncClient
from segue.config import RouterSettings
from segue.paths import logs_dir

MODEL = "fake"
_BETWEEN_LOOKS_S = 0.05


@dataclass(frozen=True, slots=True)
class FakeCluster:
    router: RouterProcess
    workers: Child


@asynccontextmanager
async def fake_cluster(
    *, router: dict[str, Any] | None = None, api_key: str | None = None, max_context: int = 8192, **workers: Any
) -> AsyncIterator[FakeCluster]:
    """`router` overrides RouterSettings, `workers` those of FakePlan; `api_key` is needed where the router asks for one. Serves
    until the block ends."""
    logs = logs_dir() / f"fake-{secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:
        model_dir = make_tiny_model(Path(stack.enter_context(tempfile.TemporaryDirectory())) / MODEL, max_context=max_context)
        valkey = await stack.enter_async_context(embedded_valkey(logs / "valkey.log"))
        common: dict[str, Any] = {"cluster_id": logs.name, "redis": valkey.url}
        plan = FakePlan(**common, model=MODEL, **workers)
        child = await stack.enter_async_context(fake_workers(plan, logs / "workers.log"))
        ports = {"http_port": 0, "grpc_port": 0, "disaggregate": "always"}
        settings = RouterSettings(**common, model_dir=model_dir, model_name=MODEL, **ports | (router or {}))
        process = await RouterProcess.start(settings, logs / "router.log")
        stack.push_async_callback(process.stop)
        await process.serving()
        async with AsyncClient(process.grpc, access=Access(api_key=api_key)) as client:
            while len((await client.wait_ready()).workers) < plan.prefill + plan.decode:  # noqa: ASYNC110 - it can only be asked
                await asyncio.sleep(_BETWEEN_LOOKS_S)
        yield FakeCluster(process, child)
