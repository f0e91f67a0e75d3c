"""Connections that break, regions that are damaged, frames that wait: many requests at a time, and no client
sees any of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench.forked_cluster import ForkedCluster
from bench.nursery import Nursery
from deploy.valkey import Valkey
from tests.chaos.conftest import Ending, Requests
from tests.support.leaks import forked_cluster_without_leaks

NUM_REQUESTS = 50
NUM_AT_A_TIME = 12


async def num_failed_transfers(cluster: ForkedCluster) -> int:
    return sum(worker.load.failed_transfers for worker in (await cluster.client.status()).workers)


async def until_counted(cluster: ForkedCluster, num_failures: int) -> None:
    """Waits until the workers have reported at least that many failed transfers."""
    async with asyncio.timeout(60):
        while await num_failed_transfers(cluster) < num_failures:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # the router can only be asked


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize(
    ("chaos", "fails"), [("delay=2ms", False), ("corrupt=0.02", True), ("drop=0.004,cut=0.004,delay=1ms", True)]
)
async def test_no_wrong_token_and_no_error(
    valkey: Valkey,
    tiny_model_dir: Path,
    nursery: Nursery,
    tmp_path: Path,
    requests: Requests,
    transport: str,
    chaos: str,
    fails: bool,
) -> None:
    settings = {"kv_transport": transport, "chaos": f"seed=2,{chaos}"}
    # So many hand-overs fail that some requests meet eight in a row.
    where = (nursery, valkey.url, tiny_model_dir, tmp_path)
    async with forked_cluster_without_leaks(*where, router={"max_attempts": 40}, **settings) as cluster:
        for worker_id in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
            await cluster.start(worker_id)
        slots = asyncio.Semaphore(NUM_AT_A_TIME)

        async def ask() -> Ending:
            async with slots:
                return await requests.talk(cluster.client)

        endings = await asyncio.gather(*(ask() for _ in range(NUM_REQUESTS)))
        assert [ending.error for ending in endings if ending.error is not None] == []
        num_failures = sum(ending.num_attempts - 1 for ending in endings)
        assert (num_failures > 0) == fails
        await until_counted(cluster, num_failures)
