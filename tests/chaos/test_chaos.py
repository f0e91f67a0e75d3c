"""The short form of `python -m bench.chaos`: processes are killed, stopped and cut off, and no client notices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.aborts import Held
from bench.chaos import CORRUPT, measure
from bench.forked_cluster import ForkedCluster, forked_cluster
from bench.nursery import Nursery
from bench.tiny_model import make_tiny_model
from deploy.valkey import Valkey

NUM_FAULTS = 24


@pytest.mark.timeout(300)
async def test_no_client_notices(valkey: Valkey, nursery: Nursery, tmp_path: Path) -> None:
    settings = {"kv_transport": "tcp", "chaos": f"corrupt={CORRUPT}"}
    async with forked_cluster(nursery, valkey.url, make_tiny_model(tmp_path / "tiny"), tmp_path, **settings) as cluster:
        outcomes, held = await measure(cluster, NUM_FAULTS, at_a_time=8, num_routers=2, seed=5)
        assert (outcomes.errors, outcomes.num_wrong, held) == ({}, 0, Held(0, 0, 0))
        assert outcomes.num_faults.total() >= NUM_FAULTS
        assert outcomes.num_failovers > 0, "some requests were hit"


async def sse(
    http: httpx.AsyncClient, address: str, body: dict[str, Any], last_event_id: str = ""
) -> AsyncIterator[tuple[str, str]]:
    """(id, text) of each event, until the stream ends or breaks."""
    event_id, headers = "", {"Last-Event-ID": last_event_id} if last_event_id else {}
    async with http.stream("POST", f"http://{address}/v1/completions", json=body, headers=headers, timeout=30) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                event_id = line.removeprefix("id: ")
            elif line.startswith("data: {"):
                yield event_id, json.loads(line.removeprefix("data: "))["choices"][0]["text"]


async def seen_until_it_breaks(cluster: ForkedCluster, events: AsyncIterator[tuple[str, str]]) -> list[tuple[str, str]]:
    """Kills its router after three events."""
    seen = []
    try:
        async for event in events:
            seen.append(event)
            if len(seen) == 3:
                cluster.kill("router-0")
    except httpx.TransportError:
        return seen
    raise AssertionError("the stream went on to its end")


async def test_an_http_stream_goes_on_at_another_router(valkey: Valkey, nursery: Nursery, tmp_path: Path) -> None:
    model_dir = make_tiny_model(tmp_path / "tiny")
    async with forked_cluster(nursery, valkey.url, model_dir, tmp_path) as cluster, httpx.AsyncClient() as http:
        for name in ("router-1", "prefill-0", "decode-0"):
            await cluster.start(name)
        while len(routers := (await cluster.client.status()).routers) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # the router can only be asked
        addresses = {router.router_id: router.http_address for router in routers}
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 150, "ignore_eos": True, "seed": 3, "stream": True}
        whole = "".join([text async for _, text in sse(http, addresses["router-1"], body)])
        seen = await seen_until_it_breaks(cluster, sse(http, addresses["router-0"], body))
        assert 3 <= len(seen) < 150
        rest = [text async for _, text in sse(http, addresses["router-1"], body, last_event_id=seen[-1][0])]
        assert "".join([*(text for _, text in seen), *rest]) == whole
