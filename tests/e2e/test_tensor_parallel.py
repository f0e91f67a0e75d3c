"""Ranks as processes under a real Ray: one dies, and its worker comes back whole."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path

import pytest

from deploy.launch import Launch
from deploy.replica import worker_log
from segue import AsyncClient, RetryPolicy
from segue.config import ClusterSettings
from tests.support.leaks import assert_no_leaks_at
from tests.support.tiny_model import make_tiny_model

PROMPT = list(range(3, 60))


async def test_a_killed_rank_takes_its_worker_down_and_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_HOME", str(tmp_path / "home"))
    model = make_tiny_model(tmp_path / "tiny", num_kv_heads=4)
    settings = ClusterSettings(
        model=str(model), prefill_tp=1, decode_tp=2, kv_memory=2**22, block_size=4, http_port=0, grpc_port=0
    )
    notes: asyncio.Queue[str] = asyncio.Queue()
    async with Launch(settings) as cluster, AsyncClient(cluster.grpc, retry=RetryPolicy(max_attempts=1)) as client:
        watching = asyncio.create_task(cluster.watch(notes.put_nowait))
        before = await client.generate(PROMPT, max_tokens=8, temperature=0.0, ignore_eos=True)
        epochs = {record.worker_id: record.epoch for record in await cluster.workers()}
        log = worker_log(cluster.id, "decode-0", rank=1)
        (pid,) = re.findall(r"pid (\d+)", log.read_text())

        os.kill(int(pid), signal.SIGKILL)
        async with asyncio.timeout(60):
            while "decode-0 was restarted" not in await notes.get():
                pass
        await client.wait_ready()
        after = await client.generate(PROMPT, max_tokens=8, temperature=0.0, ignore_eos=True)
        assert after.token_ids == before.token_ids
        again = {record.worker_id: record.epoch for record in await cluster.workers()}
        assert again["decode-0"] > epochs["decode-0"]
        assert again["prefill-0"] == epochs["prefill-0"], "other workers do not notice"
        assert len(re.findall(r"pid (\d+)", log.read_text())) == 2, "both ranks are new"
        await assert_no_leaks_at(cluster.grpc)
        watching.cancel()
