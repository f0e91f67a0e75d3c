"""Workers are drained, restarted and given other roles in the middle of traffic: no client notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bench.forked_cluster import ForkedCluster, forked_cluster
from bench.nursery import Nursery
from deploy.valkey import Valkey
from segue import AsyncClient, WorkerStatus
from segue.errors import RequestError
from tests.chaos.conftest import Ending, Requests
from tests.support.leaks import assert_no_leaks_at

WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


@asynccontextmanager
async def under_load(cluster: ForkedCluster, requests: Requests, num_clients: int = 6) -> AsyncIterator[list[Ending]]:
    """Clients that ask again and again until the block ends; then every request must have ended well. Yields what has ended."""
    endings: list[Ending] = []
    is_over = False

    async def ask() -> None:
        while not is_over:
            endings.append(await requests.talk(cluster.client))

    clients = [asyncio.create_task(ask()) for _ in range(num_clients)]
    try:
        yield endings
    finally:
        is_over = True
        await asyncio.gather(*clients)
    assert [ending.error for ending in endings if ending.error] == []


async def some_more(endings: list[Ending], number: int = 12) -> None:
    """Waits until so many further conversations have ended."""
    wanted = len(endings) + number
    while len(endings) < wanted:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def until(client: AsyncClient, worker_id: str, *, decoded_above: int = -1, **fields: object) -> WorkerStatus:
    """The worker's status, once it is so."""
    async with asyncio.timeout(60):
        while True:
            (worker,) = [worker for worker in (await client.status()).workers if worker.worker_id == worker_id]
            is_so = all(getattr(worker, name) == value for name, value in fields.items())
            if is_so and worker.load.decoded_tokens > decoded_above:
                return worker
            await asyncio.sleep(0.02)  # the router can only be asked


@pytest.mark.timeout(300)
async def test_operating_workers_under_load(
    valkey: Valkey, tiny_model_dir: Path, nursery: Nursery, tmp_path: Path, requests: Requests
) -> None:
    async with forked_cluster(nursery, valkey.url, tiny_model_dir, tmp_path) as cluster:
        client = cluster.client
        await asyncio.gather(*map(cluster.start, WORKERS))
        async with under_load(cluster, requests) as endings:
            await some_more(endings)

            # Drained at its leisure, it stays without work until it is taken back.
            assert (await client.drain_worker("decode-0")).state in {"draining", "drained"}
            with pytest.raises(RequestError, match="decode-1 is the only ready decode worker"):
                await client.drain_worker("decode-1")
            await until(client, "decode-0", state="drained")
            num_decoded = (await until(client, "decode-0", state="drained")).load.decoded_tokens
            await some_more(endings)
            assert (await until(client, "decode-0", state="drained")).load.decoded_tokens == num_decoded
            await client.drain_worker("decode-0", undo=True)
            await until(client, "decode-0", state="ready")

            # Restarted one after the other, without grace: what runs there continues elsewhere. The test keeps the processes.
            for worker_id in WORKERS:
                before = await until(client, worker_id, state="ready")
                await client.restart_worker(worker_id, grace_s=0.0)
                await cluster.until_dead(worker_id)
                await cluster.start(worker_id)
                assert (await until(client, worker_id, state="ready")).epoch > before.epoch

            # The roles of all change sides and back, by a new word or when the lease ends.
            await client.set_worker_role("prefill-0", "decode", lease_s=600)
            with pytest.raises(RequestError, match="prefill-1 is the only ready prefill worker"):
                await client.set_worker_role("prefill-1", "decode", lease_s=600)
            await client.set_worker_role("decode-0", "prefill", lease_s=1.0)
            num_decoded = (await until(client, "prefill-0", roles=("decode",))).load.decoded_tokens
            await until(client, "prefill-0", roles=("decode",), decoded_above=num_decoded)
            await until(client, "decode-0", roles=("decode",), roles_until_unix_s=0.0)
            await client.set_worker_role("prefill-0", "prefill", lease_s=600)
            assert (await until(client, "prefill-0", roles=("prefill",))).roles_until_unix_s == 0
            await some_more(endings)
        assert max(ending.num_attempts for ending in endings) > 1, "some requests went on elsewhere"
        await assert_no_leaks_at(cluster.address)
