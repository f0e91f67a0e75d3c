"""Workers of several ranks: the same tokens for any numbers of ranks on both sides, whatever else differs between them."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from deploy.ranks import run_rank
from deploy.valkey import Valkey
from deploy.worker import serving_worker
from engine.calibration import ensure_calibrated
from segue import AsyncClient, GenerateOptions
from segue.config import WorkerSettings
from segue.errors import ConfigError, WorkerLost
from tests.integration.test_aborts import leave_at
from tests.integration.test_exact import make_prompts
from tests.support.cluster import in_process_cluster
from tests.support.tiny_model import make_tiny_model

GREEDY = GenerateOptions(max_tokens=5, temperature=0.0, ignore_eos=True)
SEEDED = GenerateOptions(max_tokens=5, temperature=1.3, top_p=0.95, seed=7, repetition_penalty=1.2, ignore_eos=True)
# On and off block and chunk borders; the last begins like the one before it.
PROMPTS = [make_prompts()[index] for index in (4, 7, 8, 11, 9, 12)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", num_kv_heads=4)


async def answers(client: AsyncClient) -> list[tuple[int, ...]]:
    requests = [client.generate(prompt, **options) for prompt in PROMPTS for options in (GREEDY, SEEDED)]
    return [result.token_ids for result in await asyncio.gather(*requests)]


@pytest.fixture(scope="module")
async def expected(valkey: Valkey, model_dir: Path) -> list[tuple[int, ...]]:
    """What a single process answers, in which nothing travels."""
    async with in_process_cluster(valkey.url, model_dir, colocated=True) as cluster:
        return await answers(cluster.client)


DEGREES = (1, 2, 4)


@pytest.mark.parametrize("decode_tp", DEGREES)
@pytest.mark.parametrize("prefill_tp", DEGREES)
async def test_any_ranks_to_any_ranks(
    valkey: Valkey, model_dir: Path, expected: list[tuple[int, ...]], prefill_tp: int, decode_tp: int
) -> None:
    # Each degree on either side meets each transport; where they allow it, with blocks of another size as well.
    transport = ("shm", "tcp", "dist")[(DEGREES.index(prefill_tp) + DEGREES.index(decode_tp)) % 3]
    further: dict[str, Any] = {"kv_transport": transport, "decode_block_size": 4 if transport == "dist" else 8}
    async with in_process_cluster(valkey.url, model_dir, prefill_tp=prefill_tp, decode_tp=decode_tp, **further) as cluster:
        assert await answers(cluster.client) == expected
        assert all(not worker.load().failed_transfers for worker in cluster.workers)


@pytest.mark.parametrize("options", [{"colocated": True}, {"quantization": "int8", "kv_dtype": "int8"}])
async def test_other_ways_to_run_two_ranks(valkey: Valkey, model_dir: Path, options: dict[str, Any]) -> None:
    """In int8 the scales of activations do not depend on the number of ranks."""
    if "quantization" in options:
        ensure_calibrated(model_dir, lambda _message, _share: None)
    found = []
    for num_ranks in (1, 2):
        async with in_process_cluster(valkey.url, model_dir, prefill_tp=num_ranks, decode_tp=num_ranks, **options) as cluster:
            found.append((await answers(cluster.client), [worker.engine.pool.num_total for worker in cluster.workers]))
    assert found[0] == found[1], "tokens, and blocks in the same memory"


async def test_a_conversation_comes_back_to_every_rank(
    valkey: Valkey, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine tickets may take longer.
    monkeypatch.setattr("prefill_worker.service._TICKET_PATIENCE_S", 20.0)
    async with in_process_cluster(valkey.url, model_dir, prefill_tp=4, decode_tp=2) as cluster:
        first = await cluster.client.generate(PROMPTS[4], max_tokens=30, temperature=0.0, ignore_eos=True)
        said = [*PROMPTS[4], *first.token_ids, 9, 8, 7, 6, 5]
        second = await cluster.client.generate(said, **GREEDY)
        assert second.path.prefill_pulled_tokens > 0
    async with in_process_cluster(valkey.url, model_dir, colocated=True) as cluster:
        assert (await cluster.client.generate(said, **GREEDY)).token_ids == second.token_ids


async def test_clients_that_go_away_leave_nothing(valkey: Valkey, model_dir: Path) -> None:
    async with in_process_cluster(valkey.url, model_dir, prefill_tp=2, decode_tp=2, kv_memory=2**18) as cluster:
        chance = random.Random(3)
        await asyncio.gather(*(leave_at(cluster, chance) for _ in range(25)))
        # in_process_cluster now checks every pool.


def settings(valkey: Valkey, model_dir: Path, **further: Any) -> WorkerSettings:
    return WorkerSettings(
        cluster_id="c",
        redis=valkey.url,
        worker_id="decode-0",
        roles=("decode",),
        model_dir=model_dir,
        model_name="m",
        threads=1,
        kv_memory=2**20,
        group="g",
        **further,
    )


async def test_a_rank_that_leaves_ends_its_worker(valkey: Valkey, model_dir: Path) -> None:
    """Also while there is nothing to compute."""
    worker = settings(valkey, model_dir, decode_tp=2)
    other = asyncio.create_task(run_rank(worker.model_copy(update={"rank": 1})))

    async def serve() -> None:
        async with serving_worker(worker):
            other.cancel()
            await asyncio.Event().wait()

    with pytest.raises(WorkerLost, match="rank 1 of this worker"):
        await serve()
    with pytest.raises(asyncio.CancelledError):
        await other


async def test_numbers_of_ranks_that_the_model_cannot_have_are_refused(valkey: Valkey, model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"decode_tp: 3 ranks cannot share .* this model takes 1, 2, 4") as caught:
        async with serving_worker(settings(valkey, model_dir, decode_tp=3)):
            pass
    assert caught.value.field == "decode_tp"
