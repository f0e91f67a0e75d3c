"""`segue up` and `segue scale` with real processes: workers come and go under load, and no request fails."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deploy.launch import Launch
from deploy.progress import Stage
from deploy.valkey import Valkey
from segue import AsyncClient, RetryPolicy
from segue.config import ClusterSettings
from segue.errors import InternalError
from tests.support.leaks import assert_no_leaks_at
from tests.support.tiny_model import make_tiny_model

SEGUE = str(Path(sys.executable).with_name("segue"))
NUM_CLIENTS, NUM_TOKENS = 4, 24


@asynccontextmanager
async def load(address: str) -> AsyncIterator[list[tuple[int, ...]]]:
    """Clients that ask the same again and again, with no second try; the answers. An error ends the block."""
    answers: list[tuple[int, ...]] = []
    stop = asyncio.Event()

    async def ask(client: AsyncClient) -> None:
        while not stop.is_set():
            answer = await client.generate("Scale me", max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
            answers.append(answer.token_ids)

    async with AsyncClient(address, retry=RetryPolicy(max_attempts=1)) as client, asyncio.TaskGroup() as tasks:
        for _ in range(NUM_CLIENTS):
            tasks.create_task(ask(client))
        yield answers
        stop.set()


async def scale(address: str, *words: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(SEGUE, "scale", *words, "--address", address), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said = (await process.communicate())[0].decode()
    assert process.returncode == 0, said
    return said


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterSettings:
    monkeypatch.setenv("SEGUE_HOME", str(tmp_path))
    model = make_tiny_model(tmp_path / "tiny")
    return ClusterSettings(
        model=str(model), http_port=0, grpc_port=0, kv_memory=2**20, block_size=4, threads=1, policy="round_robin"
    )


async def test_workers_come_and_go_under_load(settings: ClusterSettings) -> None:
    async with asyncio.timeout(150), Launch(settings) as cluster, AsyncClient(cluster.grpc) as client:

        async def epochs() -> dict[str, int]:
            return {worker.worker_id: worker.epoch for worker in (await client.status()).workers if worker.state == "ready"}

        first = await epochs()
        async with load(cluster.grpc) as answers:
            assert "2 prefill and 2 decode workers serve" in await scale(cluster.grpc, "prefill=2", "decode=2")
            assert (await epochs()).keys() == {"prefill-0", "prefill-1", "decode-0", "decode-1"}
            pids = {record.worker_id: record.pid for record in await cluster.workers()}
            assert "1 prefill and 1 decode workers serve" in await scale(cluster.grpc, "prefill=1", "decode=1")
            assert await epochs() == first, "the highest numbers leave, and the others stay as they are"
        assert answers
        assert len(set(answers)) == 1
        for worker_id in ("prefill-1", "decode-1"):
            with pytest.raises(ProcessLookupError):
                os.kill(pids[worker_id], 0)
        await assert_no_leaks_at(cluster.grpc)


async def test_what_was_asked_for_holds_when_the_cluster_is_started_again(
    settings: ClusterSettings, valkey: Valkey, cluster_id: str
) -> None:
    """The driver is killed, and with it all workers; the next life of the cluster has as many as segue scale had asked for."""
    settings = settings.model_copy(update={"redis": valkey.url, "cluster_id": cluster_id})
    async with asyncio.timeout(150):
        async with Launch(settings) as cluster:
            await scale(cluster.grpc, "decode=2")
            before = {record.worker_id: record for record in await cluster.workers()}
            os.kill(cluster.driver.pid, signal.SIGKILL)
            with pytest.raises(InternalError, match="ray was killed by SIGKILL"):
                await cluster.watch(lambda _line: None)
        stages: list[Stage] = []
        async with Launch(settings, stages.append) as cluster, AsyncClient(cluster.grpc) as client:
            assert any("segue scale asked for prefill=1 decode=2, which holds" in stage.detail for stage in stages)
            records = {record.worker_id: record for record in await cluster.workers()}
            assert records.keys() == before.keys() == {"prefill-0", "decode-0", "decode-1"}
            assert all(records[name].epoch > before[name].epoch for name in records), "not what the earlier life left behind"
            assert {worker.state for worker in (await client.status()).workers} == {"ready"}
            assert "1 prefill and 1 decode workers serve" in await scale(cluster.grpc, "decode=1")
            ready = {worker.worker_id for worker in (await client.status()).workers if worker.state == "ready"}
            assert ready == {"prefill-0", "decode-0"}
