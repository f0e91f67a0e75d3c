"""Placement by what workers tell: prompts go where their beginnings are, and phases join where that costs less."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from deploy.valkey import Valkey
from segue import GenerateOptions
from segue.worker_link import CACHE_INTERVAL_S
from tests.support.cluster import Cluster, in_process_cluster

OPTIONS = GenerateOptions(max_tokens=6, temperature=0.0, ignore_eos=True)


def make_prompts(count: int, num_tokens: int) -> list[list[int]]:
    chance = random.Random(num_tokens)
    return [[chance.randrange(3, 259) for _ in range(num_tokens)] for _ in range(count)]


async def until_told(cluster: Cluster) -> None:
    """Waits until the router knows of as many blocks as the workers' caches hold."""
    index = cluster.front.server._workers.fleet._index  # type: ignore[attr-defined]
    hashes = {block_hash for worker in cluster.workers for block_hash in worker.engine.pool.published}
    async with asyncio.timeout(10):
        while len(index) < len(hashes):  # noqa: ASYNC110
            await asyncio.sleep(CACHE_INTERVAL_S / 5)  # the index tells nobody


async def test_a_prompt_goes_where_its_beginning_is(valkey: Valkey, tiny_model_dir: Path) -> None:
    prompts = make_prompts(8, 60)
    async with in_process_cluster(valkey.url, tiny_model_dir, prefill=2, decode=2) as cluster:
        first = await asyncio.gather(*(cluster.client.generate(prompt, **OPTIONS) for prompt in prompts))
        assert {result.path.prefill_worker for result in first} == {"prefill-0", "prefill-1"}
        await until_told(cluster)
        for prompt, before in zip(prompts, first, strict=True):
            again = await cluster.client.generate([*prompt, 7, 8, 9], **OPTIONS)
            assert again.path.prefill_worker == before.path.prefill_worker
            assert again.path.prefill_cached_tokens + again.path.prefill_pulled_tokens >= 56


async def test_who_joins_late_is_told_all(valkey: Valkey, tiny_model_dir: Path) -> None:
    async with in_process_cluster(valkey.url, tiny_model_dir) as cluster:
        await cluster.client.generate(make_prompts(1, 60)[0], **OPTIONS)
        await until_told(cluster)
        workers = cluster.front.server._workers  # type: ignore[attr-defined]
        (link,) = [link for link in workers.available() if link.record.worker_id == "prefill-0"]
        changed = workers.changed.listener()
        workers._tasks[link].cancel()  # the link breaks, and another is opened
        while workers._links["prefill-0"] is link or not workers._links["prefill-0"].is_open:
            await changed.wait()
            changed.clear()
        await until_told(cluster)


async def test_joined_or_not_the_tokens_are_the_same(valkey: Valkey, tiny_model_dir: Path) -> None:
    prompts = [prompt for size in (1, 3, 9, 40, 120) for prompt in make_prompts(3, size)]
    answers, ways = [], set[str]()
    for disaggregate in ("always", "auto"):
        router = {"disaggregate": disaggregate}
        async with in_process_cluster(valkey.url, tiny_model_dir, prefill=2, decode=2, router=router) as cluster:
            results = [await cluster.client.generate(prompt, **OPTIONS) for prompt in prompts]
            results += await asyncio.gather(*(cluster.client.generate(prompt, **OPTIONS) for prompt in prompts))
        answers.append([result.token_ids for result in results])
        joined = {result.path.prefill_worker == result.path.decode_worker for result in results}
        ways |= {f"{disaggregate}: {'joined' if one else 'apart'}" for one in joined}
    assert answers[0] == answers[1]
    assert ways >= {"always: apart", "auto: joined"}
    assert "always: joined" not in ways


async def test_prompts_that_wait_count_without_what_is_cached(valkey: Valkey, tiny_model_dir: Path) -> None:
    (prompt,) = make_prompts(1, 61)
    async with in_process_cluster(valkey.url, tiny_model_dir) as cluster:
        await cluster.client.generate(prompt, **OPTIONS)
        prefill = cluster.worker("prefill-0")
        pool = prefill.engine.pool
        all_free = pool.lease(pool.num_free)
        assert all_free is not None
        longer = [*prompt, *make_prompts(1, 200)[0]]
        answer = asyncio.create_task(cluster.client.generate(longer, **OPTIONS))
        async with asyncio.timeout(10):
            while not prefill.load().waiting_requests:  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # the service tells nobody
        assert prefill.load().queued_tokens == 261 - 60
        pool.release(all_free)
        prefill.active_legs[1]._wakeups.notify()  # type: ignore[attr-defined]
        await answer
        assert prefill.load().queued_tokens == 0
