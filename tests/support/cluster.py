"""A whole cluster within the test's own process and loop: real gRPC links, real KV sockets, real membership, a tiny model."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.ranks import run_rank
from deploy.worker import Worker, serving_worker
from router.app import serving_router
from router.front import Front
from segue import AsyncClient
from segue.config import RouterSettings, WorkerSettings
from tests.support.leaks import assert_no_leaks

MODEL_NAME = "tiny"


@dataclass
class Cluster:
    front: Front
    workers: list[Worker]
    client: AsyncClient

    def worker(self, worker_id: str) -> Worker:
        return next(worker for worker in self.workers if worker.settings.worker_id == worker_id)


@asynccontextmanager
async def all_ranks(settings: WorkerSettings) -> AsyncIterator[Worker]:
    """A worker with the ranks after its first, which end with it."""
    settings = settings.model_copy(update={"group": uuid.uuid4().hex})
    others = [
        asyncio.create_task(run_rank(settings.model_copy(update={"rank": rank}))) for rank in range(1, settings.num_ranks)
    ]
    try:
        async with serving_worker(settings) as worker:
            yield worker
    finally:
        await asyncio.gather(*others)


@asynccontextmanager
async def in_process_cluster(
    redis_url: str,
    model_dir: Path,
    *,
    prefill: int = 1,
    decode: int = 1,
    colocated: bool = False,
    router: dict[str, Any] | None = None,
    **worker: Any,
) -> AsyncIterator[Cluster]:
    """`router` and `worker` override settings: unless told otherwise, prompts and answers are computed by different workers.
    Checks for leaks before it stops."""
    cluster_id = uuid.uuid4().hex[:12]
    common = {"cluster_id": cluster_id, "redis": redis_url, "model_dir": model_dir, "model_name": MODEL_NAME}
    worker_options = {"threads": 1, "kv_memory": 2**20, "block_size": 4, "max_prefill_tokens": 32} | worker
    if colocated:
        roles = {"both-0": ("prefill", "decode")}
    else:
        roles = {f"prefill-{i}": ("prefill",) for i in range(prefill)} | {f"decode-{i}": ("decode",) for i in range(decode)}
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(
                all_ranks(WorkerSettings(**common, worker_id=worker_id, roles=its_roles, **worker_options))
            )
            for worker_id, its_roles in roles.items()
        ]
        router_options = {"http_port": 0, "grpc_port": 0, "disaggregate": "always"} | (router or {})
        settings = RouterSettings(**common, **router_options)
        front = await stack.enter_async_context(serving_router(settings))
        client = await stack.enter_async_context(AsyncClient(front.grpc_address))
        await client.wait_ready()
        yield Cluster(front, workers, client)
        await assert_no_leaks(workers)
