"""Clients that go away, workers that leave, memory that is full: nothing leaks, nothing hangs, the rest is served."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from deploy.valkey import Valkey
from segue import AsyncClient, Completed, GenerateOptions, Output, RetryPolicy
from segue.errors import NoWorker, SegueError
from segue.v1.worker_pb2 import DEPARTURE_LEAVE
from tests.support.cluster import Cluster, in_process_cluster

GREEDY = GenerateOptions(max_tokens=30, temperature=0.0, ignore_eos=True)


async def leave_at(cluster: Cluster, chance: random.Random) -> None:
    """One client that reads a random number of events, or waits a random number of loop steps, and goes."""
    prompt = [chance.randrange(3, 259) for _ in range(chance.choice((2, 20, 70, 140)))]
    stream = cluster.client.stream(prompt, **GREEDY)
    if chance.random() < 0.5:
        num_events = chance.randrange(0, 12)
        async with stream:
            async for _ in stream:
                num_events -= 1
                if num_events < 0:
                    return
        return
    reading = asyncio.ensure_future(cluster.client.generate(prompt, **GREEDY))
    for _ in range(chance.randrange(0, 200)):
        await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


@pytest.mark.parametrize(("colocated", "kv_transport"), [(True, "auto"), (False, "shm"), (False, "tcp")])
async def test_clients_that_go_away_at_any_moment_leave_nothing(
    valkey: Valkey, tiny_model_dir: Path, colocated: bool, kv_transport: str
) -> None:
    async with in_process_cluster(
        valkey.url, tiny_model_dir, colocated=colocated, kv_transport=kv_transport, kv_memory=2**18
    ) as cluster:
        expected = await cluster.client.generate([5] * 9, **GREEDY)
        chance = random.Random(3)
        for _ in range(6):
            await asyncio.gather(*(leave_at(cluster, chance) for _ in range(25)))
        assert (await cluster.client.generate([5] * 9, **GREEDY)).token_ids == expected.token_ids
        # in_process_cluster now checks every pool.


async def test_other_streams_do_not_notice(valkey: Valkey, tiny_model_dir: Path) -> None:
    async with in_process_cluster(valkey.url, tiny_model_dir) as cluster:
        prompts = [[3 + i] * (10 + i) for i in range(8)]
        alone = [(await cluster.client.generate(prompt, **GREEDY)).token_ids for prompt in prompts]
        chance = random.Random(4)
        staying = [cluster.client.generate(prompt, **GREEDY) for prompt in prompts]
        leaving = [leave_at(cluster, chance) for _ in range(40)]
        results = await asyncio.gather(*staying, *leaving)
        assert [result.token_ids for result in results[: len(prompts)]] == alone


@pytest.mark.parametrize("worker_id", ["prefill-1", "decode-1"])
async def test_a_drained_worker_finishes_what_it_has_and_gets_nothing_new(
    valkey: Valkey, tiny_model_dir: Path, worker_id: str
) -> None:
    async with in_process_cluster(valkey.url, tiny_model_dir, prefill=2, decode=2) as cluster:
        running = [asyncio.ensure_future(cluster.client.generate([9] * (20 + i), **GREEDY)) for i in range(12)]
        for _ in range(30):
            await asyncio.sleep(0)
        worker = cluster.worker(worker_id)
        worker.duty.drain(60.0, DEPARTURE_LEAVE)
        await worker.duty.departure
        assert all(leg.num_sequences == 0 for leg in worker.active_legs)
        await asyncio.gather(*running)
        before = worker.load()
        await asyncio.gather(*(cluster.client.generate([8] * (20 + i), **GREEDY) for i in range(6)))
        assert worker.load() == before
        states = {worker.worker_id: worker.state for worker in (await cluster.client.status()).workers}
        assert states[worker_id] in {"draining", "drained"}, "its load is told twice a second"


async def test_without_a_worker_for_a_role_requests_fail_at_once_and_readably(valkey: Valkey, tiny_model_dir: Path) -> None:
    async with in_process_cluster(valkey.url, tiny_model_dir) as cluster:
        cluster.worker("decode-0").duty.drain(60.0, DEPARTURE_LEAVE)
        await cluster.worker("decode-0").duty.departure
        async with AsyncClient(cluster.front.grpc_address, retry=RetryPolicy(max_attempts=1)) as client:
            with pytest.raises(NoWorker, match="no decode worker is ready") as caught:
                await client.generate([5, 6], **GREEDY)
            assert caught.value.retryable


async def test_every_request_ends_in_exactly_one_terminal_event(valkey: Valkey, tiny_model_dir: Path) -> None:
    async def terminal_events(prompt: list[int], max_tokens: int) -> int:
        completed = 0
        async for event in cluster.client.stream(prompt, max_tokens=max_tokens, temperature=0.0, num_choices=2):
            assert not completed, "nothing comes after the end"
            completed += isinstance(event, Completed)
            assert isinstance(event, Output | Completed) or event.request_id
        return completed

    async with in_process_cluster(valkey.url, tiny_model_dir) as cluster:
        results = await asyncio.gather(*(terminal_events([4 + i] * (1 + 3 * i), 1 + i) for i in range(20)))
        assert results == [1] * 20


async def test_one_bad_request_among_good_ones(valkey: Valkey, tiny_model_dir: Path) -> None:
    async with in_process_cluster(valkey.url, tiny_model_dir) as cluster:
        bad = [
            cluster.client.generate([], **GREEDY),
            cluster.client.generate([259], **GREEDY),
            cluster.client.generate([5] * 600, **GREEDY),
            cluster.client.generate([5], max_tokens=10_000),
            cluster.client.generate([5], temperature=-1.0),
        ]
        good = [cluster.client.generate([5 + i], **GREEDY) for i in range(4)]
        results = await asyncio.gather(*bad, *good, return_exceptions=True)
        assert all(isinstance(result, SegueError) and result.field for result in results[:5]), results[:5]
        assert not any(isinstance(result, BaseException) for result in results[5:])
