"""The short form of `python -m bench.aborts`: clients leave at random moments, and a full cache answers everybody."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.aborts import REQUEST_LIMIT_S, Crowd, Held, held_at_rest
from bench.nursery import Nursery
from bench.prompts import random_prompts
from bench.tiny_model import make_tiny_model
from deploy.valkey import Valkey
from tests.support.leaks import forked_cluster_without_leaks


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_who_leaves_leaves_nothing_and_a_full_cache_answers_everybody(
    valkey: Valkey, nursery: Nursery, tmp_path: Path, transport: str
) -> None:
    model_dir = make_tiny_model(tmp_path / "tiny")
    router = {"request_timeout_s": REQUEST_LIMIT_S}
    # 85 blocks of 4 tokens: two of the longest requests.
    settings = {"kv_transport": transport, "kv_memory": 2**17}
    async with forked_cluster_without_leaks(nursery, valkey.url, model_dir, tmp_path, router=router, **settings) as cluster:
        for worker_id in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
            await cluster.start(worker_id)
        prompts = [prompt for size in (1, 20, 60, 120) for prompt in random_prompts(3, size, 250, seed=size)]
        crowd = Crowd(cluster.client, prompts)
        await crowd.learn()
        outcomes = await crowd.leave(150, at_a_time=24)
        assert outcomes.num_left >= 150
        assert outcomes.num_answered > 0
        assert (outcomes.num_wrong, outcomes.errors) == (0, {})
        assert await held_at_rest(cluster.client) == Held(0, 0, 0)
        outcomes = await crowd.fill(60)
        assert (outcomes.num_answered, outcomes.num_wrong, outcomes.errors) == (60, 0, {})
