"""The one place where leaks are looked for. After every test that touched blocks, on every worker that lives:

free + leased + cached == total, leased == 0, no leg holds a sequence, and no ticket is open.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from bench.forked_cluster import ForkedCluster, forked_cluster
from deploy.worker import Worker
from segue import AsyncClient
from segue.worker_link import LOAD_INTERVAL_S

# Longer than anything may hold blocks after its request ended: a ticket's lease is the longest.
SETTLE_S = 15.0


async def assert_no_leaks(workers: Sequence[Worker]) -> None:
    """For workers in this process: looks at the pools themselves."""
    for worker in workers:
        for leg in worker.active_legs:
            async with asyncio.timeout(SETTLE_S):
                await leg.wait_empty()
        pool = worker.engine.pool
        pool.check()
        counts = f"{pool.num_free} free, {pool.num_leased} leased, {pool.num_cached} cached of {pool.num_total}"
        assert pool.num_leased == 0, f"{worker.settings.worker_id} leaked: {counts}"
        assert worker.load().open_tickets == 0, f"{worker.settings.worker_id} has tickets that are not over"
        assert pool.num_free + pool.num_cached == pool.num_total, f"{worker.settings.worker_id} lost blocks: {counts}"


@asynccontextmanager
async def forked_cluster_without_leaks(*where: Any, **settings: Any) -> AsyncIterator[ForkedCluster]:
    """See forked_cluster. Checks for leaks before it stops."""
    async with forked_cluster(*where, **settings) as cluster:
        yield cluster
        await assert_no_leaks_at(cluster.address)


async def assert_no_leaks_at(grpc_address: str) -> None:
    """For workers in processes of their own: asks the router until their reported load is that of an idle worker."""
    async with AsyncClient(grpc_address) as client:
        deadline = asyncio.get_running_loop().time() + SETTLE_S
        while True:
            # What a worker said last may be from before the end.
            await asyncio.sleep(1.2 * LOAD_INTERVAL_S)
            status = await client.status()
            busy = [
                f"{worker.worker_id}: {worker.load}"
                for worker in status.workers
                if worker.state == "ready"
                and (
                    worker.load.leased_blocks
                    or worker.load.open_tickets
                    or worker.load.waiting_requests
                    or worker.load.running_requests
                    or worker.load.free_blocks + worker.load.cached_blocks != worker.load.total_blocks
                )
            ]
            if not busy and not status.active_requests:
                return
            assert asyncio.get_running_loop().time() < deadline, f"still held after {SETTLE_S} s: {busy}, {status}"
