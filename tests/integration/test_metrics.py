"""What workers tell of themselves, as metrics have it."""

from __future__ import annotations

import time
from pathlib import Path

from deploy.valkey import Valkey
from tests.support.cluster import in_process_cluster


async def test_workers_tell_their_batches_and_when_they_started(valkey: Valkey, tiny_model_dir: Path) -> None:
    before_s = time.time()
    async with in_process_cluster(valkey.url, tiny_model_dir) as cluster:
        await cluster.client.generate([5] * 21, num_choices=3, max_tokens=20, ignore_eos=True)
        load = cluster.worker("decode-0").load()
        starts = [worker.started_unix_s for worker in cluster.front.server.status().workers]
    assert load.decode_step_sequences.sum == load.decoded_tokens
    num_of_one = load.decode_step_sequences.counts[0]
    assert sum(load.decode_step_sequences.counts) > num_of_one, "some step computed several sequences"
    assert len(starts) == 2
    assert all(before_s <= start_s <= time.time() for start_s in starts)
