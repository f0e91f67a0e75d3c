"""A conversation's next turn prefills only its new tokens: decode sends back the KV of what it generated."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from decode_worker.service import DecodeService
from deploy.valkey import Valkey
from kv_transfer.handover import HandOver
from kv_transfer.transports import ShmWriter
from segue import AsyncClient, GenerateOptions
from segue.client.events import RequestPath
from segue.errors import InternalError
from segue.v1.inference_pb2 import WorkerLoad
from tests.support.cluster import Cluster, in_process_cluster

BLOCK_SIZE = 4
ANSWER = GenerateOptions(max_tokens=30, temperature=0.0, ignore_eos=True)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine tickets may take longer than a prompt waits for them."""
    monkeypatch.setattr("prefill_worker.service._TICKET_PATIENCE_S", 30.0)


async def converse(client: AsyncClient, turns: int = 5) -> list[tuple[int, tuple[int, ...], RequestPath]]:
    """(tokens of the prompt, answer, path) of each turn; each prompt is all that was said before and something new."""
    chance = random.Random(3)
    said: list[int] = []
    results = []
    for _ in range(turns):
        said += [chance.randrange(3, 259) for _ in range(21)]
        result = await client.generate(said, **ANSWER)
        results.append((len(said), result.token_ids, result.path))
        said += result.token_ids
    return results


@pytest.fixture(scope="module")
async def expected(valkey: Valkey, tiny_model_dir: Path) -> list[tuple[int, ...]]:
    """The answers of a single worker, in which nothing has to travel."""
    async with in_process_cluster(valkey.url, tiny_model_dir, colocated=True) as cluster:
        turns = await converse(cluster.client)
    assert all(path.prefill_pulled_tokens == 0 for _, _, path in turns)
    return [answer for _, answer, _ in turns]


@pytest.mark.parametrize(
    "settings",
    [{"kv_transport": "shm"}, {"kv_transport": "tcp"}, {"decode_block_size": 16}, {"block_size": 8, "decode_block_size": 2}],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
async def test_the_next_turn_prefills_only_what_is_new(
    valkey: Valkey, tiny_model_dir: Path, expected: list[tuple[int, ...]], settings: dict[str, Any]
) -> None:
    async with in_process_cluster(valkey.url, tiny_model_dir, **settings) as cluster:
        workers = [cluster.worker("prefill-0"), cluster.worker("decode-0")]
        before = [counted(worker.load()) for worker in workers]
        turns = await converse(cluster.client)
        prefill, decode = (counted(worker.load()) - past for worker, past in zip(workers, before, strict=True))
        assert [answer for _, answer, _ in turns] == expected
        assert all(not worker.load().failed_transfers for worker in cluster.workers)
    paths = [path for _, _, path in turns]
    # The workers counted what the answers' paths say.
    assert prefill["prefill"] == sum(path.prefill_cached_tokens for path in paths)
    assert prefill["prefill_from_decode"] == sum(path.prefill_pulled_tokens for path in paths)
    assert decode["decode"] == sum(path.decode_cached_tokens for path in paths)
    assert prefill["sent_bytes"] == sum(path.transferred_bytes for path in paths)
    assert (prefill["transfers"], decode["transfers"]) == (len(turns), len(turns) - 1)
    assert prefill["prefill_steps"] == prefill["prefilled"] > 0
    assert decode["decode_steps"] == decode["decoded"] == sum(len(answer) - 1 for answer in expected)
    assert decode["sent_bytes"] > 0
    block_size = max(settings.get("block_size", BLOCK_SIZE), settings.get("decode_block_size", 0))
    for (previous, answer, _), (num_tokens, _, path) in itertools.pairwise(turns):
        # KV of the last token of an answer is computed by nobody; blocks that are not full are not shared.
        known = (previous + len(answer) - 1) // block_size * block_size
        assert path.prefill_cached_tokens + path.prefill_pulled_tokens >= known
        assert path.prefill_pulled_tokens > 0
        assert num_tokens - path.prefill_cached_tokens - path.prefill_pulled_tokens <= 21 + 2 * block_size
        assert path.decode_cached_tokens >= known


def counted(load: WorkerLoad) -> Counter[str]:
    """What a worker has counted since it started."""
    return Counter(
        {
            "prefilled": load.prefilled_tokens,
            "decoded": load.decoded_tokens,
            "sent_bytes": load.transferred_bytes,
            "transfers": sum(load.transfer_seconds.counts),
            "prefill_steps": int(load.prefill_step_tokens.sum),
            "decode_steps": int(load.decode_step_sequences.sum),
            **load.prefix_hits,
        }
    )


async def second_turn(cluster: Cluster) -> tuple[int, ...]:
    """The answer of a turn for which prefill asked decode for KV and did not get it."""
    (_, _, _), (_, answer, path) = await converse(cluster.client, turns=2)
    assert path.prefill_pulled_tokens == 0
    assert path.prefill_cached_tokens > 0
    return answer


async def test_what_arrives_damaged_is_computed_anew(
    valkey: Valkey, tiny_model_dir: Path, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with in_process_cluster(valkey.url, tiny_model_dir, kv_transport="shm") as cluster:
        prefill = cluster.worker("prefill-0")
        honest = ShmWriter.write

        def damaging(writer: ShmWriter, parcel: Any, regions: list[memoryview]) -> Any:
            payload = honest(writer, parcel, regions)
            if writer.target.memory.segment.name == prefill_memory_name:
                writer.target.memory.region(parcel.layer, parcel.targets[0])[3] ^= 1
            return payload

        prefill_memory_name = prefill.memory.segment.name
        monkeypatch.setattr(ShmWriter, "write", damaging)
        assert await second_turn(cluster) == expected[1]
        assert prefill.load().failed_transfers == 1
        assert prefill.load().transfer_failures == {"checksum_mismatch": 1}


async def test_a_decode_worker_that_sends_nothing_is_waited_for_no_longer_than_a_lease(
    valkey: Valkey, tiny_model_dir: Path, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecodeService, "_send", lambda *_: None)
    async with in_process_cluster(valkey.url, tiny_model_dir, ticket_lease_ms=400) as cluster:
        assert await second_turn(cluster) == expected[1]


async def test_a_defect_at_decode_ends_the_request_and_keeps_nobody_waiting(
    valkey: Valkey, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    class Broken:
        @staticmethod
        async def open(*arguments: Any) -> HandOver:
            hand_over = await HandOver.open(*arguments)
            hand_over.send = broken  # type: ignore[method-assign]
            return hand_over

    monkeypatch.setattr("decode_worker.service.HandOver", Broken)
    async with in_process_cluster(valkey.url, tiny_model_dir, ticket_lease_ms=60_000) as cluster:
        with pytest.raises(InternalError, match="a defect"):
            await second_turn(cluster)


async def test_a_client_may_go_away_while_kv_is_fetched(
    valkey: Valkey, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()
    monkeypatch.setattr(DecodeService, "_send", lambda *_: asked.set())
    async with in_process_cluster(valkey.url, tiny_model_dir) as cluster:
        said = [*range(3, 40)]
        said += (await cluster.client.generate(said, **ANSWER)).token_ids
        request = asyncio.create_task(cluster.client.generate(said, **ANSWER))
        await asked.wait()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
