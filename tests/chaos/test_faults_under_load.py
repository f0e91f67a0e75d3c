"""Connections that break, regions that are damaged, frames that wait: many requests at a time, and never a wrong token."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from deploy.valkey import Valkey
from segue.errors import ChecksumMismatch, SegueError, TransferError
from tests.chaos.conftest import Ending, Requests
from tests.support.forked_cluster import ForkedCluster, Nursery, forked_cluster

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
    ("chaos", "ends_with"),
    [("delay=2ms", None), ("corrupt=0.003", ChecksumMismatch), ("drop=0.004,cut=0.004,delay=1ms", TransferError)],
)
async def test_no_wrong_token(
    valkey: Valkey,
    tiny_model_dir: Path,
    nursery: Nursery,
    tmp_path: Path,
    requests: Requests,
    transport: str,
    chaos: str,
    ends_with: type[SegueError] | None,
) -> None:
    settings = {"kv_transport": transport, "chaos": f"seed=2,{chaos}"}
    async with forked_cluster(nursery, valkey.url, tiny_model_dir, tmp_path, **settings) as cluster:
        for worker_id in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
            await cluster.start(worker_id)
        slots = asyncio.Semaphore(NUM_AT_A_TIME)

        async def ask() -> Ending:
            async with slots:
                return await requests.talk(cluster.client)

        endings = await asyncio.gather(*(ask() for _ in range(NUM_REQUESTS)))
        errors = [ending.error for ending in endings if ending.error is not None]
        assert {type(error) for error in errors} == ({ends_with} if ends_with else set()), errors
        assert len(errors) < NUM_REQUESTS, "some conversations meet no fault"
        await until_counted(cluster, len(errors))
