"""Workers that are killed, hang and come back, and nobody notices: real processes, the real model (slow enough to be caught at
work)."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from bench.local_cluster import LocalCluster
from segue import AsyncClient, GenerateOptions, Generation, Output, RetryPolicy
from segue.client.results import GenerationBuilder
from tests.e2e.conftest import make_text
from tests.support.leaks import assert_no_leaks_at

LONG = GenerateOptions(max_tokens=60, temperature=0.0, ignore_eos=True)
SHORT = GenerateOptions(max_tokens=4, temperature=0.0)


@pytest.fixture(scope="module")
async def cluster(real_model_dir: Path) -> AsyncIterator[LocalCluster]:
    """Places in turn, so that every worker has its share of what is lost."""
    settings = {"policy": "round_robin"}
    async with LocalCluster(real_model_dir, prefill=2, decode=2, kv_memory="256MiB", router_settings=settings) as cluster:
        yield cluster


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    """A client that never tries again, on a cluster that is whole; checks for leaks at the end."""
    async with AsyncClient(cluster.grpc_address, retry=RetryPolicy(max_attempts=1)) as client:
        for worker in cluster.workers:
            if not worker.is_alive:
                await cluster.restart(worker.worker_id)
        await cluster.wait_ready()
        yield client
        await assert_no_leaks_at(cluster.grpc_address)


async def tokens_undisturbed(client: AsyncClient, prompts: list[str]) -> dict[str, tuple[int, ...]]:
    answers = await asyncio.gather(*(client.generate(prompt, **LONG) for prompt in prompts))
    return {prompt: answer.token_ids for prompt, answer in zip(prompts, answers, strict=True)}


async def start_decoding(client: AsyncClient, prompts: list[str]) -> list[asyncio.Future[Generation]]:
    """Requests that have all shown a token of their decode worker, and go on."""
    decoding = [asyncio.Event() for _ in prompts]

    async def read(prompt: str, event: asyncio.Event) -> Generation:
        builder, num_outputs = GenerationBuilder(), 0
        async with client.stream(prompt, **LONG) as stream:
            async for item in stream:
                builder.add(item)
                num_outputs += isinstance(item, Output)
                if num_outputs > 1:
                    event.set()
        return builder.build()

    reading = [asyncio.ensure_future(read(*pair)) for pair in zip(prompts, decoding, strict=True)]
    await asyncio.gather(*(event.wait() for event in decoding))
    return reading


async def is_ready(cluster: LocalCluster) -> bool:
    async with httpx.AsyncClient() as http:
        return (await http.get(f"http://{cluster.http_address}/ready", timeout=20.0)).status_code == 200


async def test_killed_decode_worker(cluster: LocalCluster, client: AsyncClient) -> None:
    prompts = [make_text(8, seed) for seed in range(4)]
    undisturbed = await tokens_undisturbed(client, prompts)
    reading = await start_decoding(client, prompts)
    await cluster.kill("decode-1", signal.SIGKILL)
    results = await asyncio.gather(*reading)
    assert {prompt: result.token_ids for prompt, result in zip(prompts, results, strict=True)} == undisturbed
    assert sorted(result.path.attempts for result in results) == [1, 1, 2, 2]
    assert {result.path.decode_worker for result in results} == {"decode-0"}
    assert await is_ready(cluster), "the other decode worker serves"


async def test_killed_prefill_worker(cluster: LocalCluster, client: AsyncClient) -> None:
    decoding_prompts = [make_text(8, seed) for seed in range(2)]
    undisturbed = await tokens_undisturbed(client, decoding_prompts)
    decoding = await start_decoding(client, decoding_prompts)
    prefilling = [asyncio.ensure_future(client.generate(make_text(700, seed), **SHORT)) for seed in (50, 51)]
    while sum(worker.load.queued_tokens > 0 for worker in (await client.status()).workers) < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.05)  # the router can only be asked
    await cluster.kill("prefill-0", signal.SIGKILL)
    results = await asyncio.gather(*prefilling)
    assert sorted(result.path.attempts for result in results) == [1, 2]
    assert {result.path.prefill_worker for result in results} == {"prefill-1"}
    for prompt, task in zip(decoding_prompts, decoding, strict=True):
        result = await task
        assert result.token_ids == undisturbed[prompt]
        assert result.path.attempts == 1, "what decodes does not need its prefill worker"
    assert await is_ready(cluster)


async def test_without_any_decode_worker_ready_says_so_and_a_restart_mends_it(
    cluster: LocalCluster, client: AsyncClient
) -> None:
    await cluster.kill("decode-0")
    await cluster.kill("decode-1")
    async with asyncio.timeout(60):
        while await is_ready(cluster):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    waiting = asyncio.ensure_future(client.generate("Hello", **SHORT))
    await cluster.restart("decode-0")
    await cluster.wait_ready()
    assert (await waiting).usage.num_output_tokens >= 1
    epochs = {worker.worker_id: worker.epoch for worker in (await client.status()).workers}
    assert epochs["decode-0"] == max(epochs.values())


async def test_a_hung_worker_is_given_up_and_taken_back(cluster: LocalCluster, client: AsyncClient) -> None:
    prompts = [make_text(8, seed) for seed in range(2)]
    undisturbed = await tokens_undisturbed(client, prompts)
    reading = await start_decoding(client, prompts)
    process = cluster.worker("decode-0").process
    process.signal(signal.SIGSTOP)
    try:
        results = await asyncio.gather(*reading)
        assert {prompt: result.token_ids for prompt, result in zip(prompts, results, strict=True)} == undisturbed
        assert {result.path.decode_worker for result in results} == {"decode-1"}
        assert (await client.generate("Hello", **SHORT)).path.decode_worker == "decode-1"
    finally:
        process.signal(signal.SIGCONT)
    await cluster.wait_ready()
    results = await asyncio.gather(*(client.generate(f"Hello {i}", **LONG) for i in range(4)))
    assert {result.path.decode_worker for result in results} == {"decode-0", "decode-1"}


async def test_sigterm_drains(cluster: LocalCluster, client: AsyncClient) -> None:
    reading = await start_decoding(client, [make_text(8, seed) for seed in range(4)])
    await cluster.kill("decode-1", signal.SIGTERM)  # waits for its end
    results = await asyncio.gather(*reading)
    assert {result.path.decode_worker for result in results} == {"decode-0", "decode-1"}
    assert cluster.worker("decode-1").process.exited.result() == 0
