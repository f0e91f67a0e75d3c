"""A worker dies at every step of a hand-over, on either side, over both real transports.

In each round one worker of each role kills itself when it first takes part in the event, beside one of each that lives through
all rounds. Every request gets its whole answer, those that are left serve on, and in the end they hold nothing.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from bench.forked_cluster import ForkedCluster
from bench.nursery import Nursery
from deploy.valkey import Valkey
from segue.chaos import FRAMES, STEPS
from tests.chaos.conftest import Requests
from tests.support.leaks import forked_cluster_without_leaks

# Renewed after a third of it: within a request, if its frames wait.
LEASE_MS = 900
SLOW = "delay=300ms"
EVENTS = [*(f"{moment}{frame}" for frame in FRAMES if frame != "ping" for moment in ("", "after-")), *STEPS]


async def traffic(cluster: ForkedCluster, requests: Requests, chance: random.Random, event: str) -> None:
    """Some stay, some leave: of those a hand-over is revoked or abandoned. No client sees an error."""
    client = cluster.client
    staying = [requests.ask(client, next(requests.long)), requests.talk(client), requests.talk(client)]
    leaving = [requests.ask(client, next(requests.long), leave_after_s=chance.random() * 0.1) for _ in range(4)]
    endings = await asyncio.gather(*staying, *leaving)
    assert [ending.error for ending in endings if ending.error is not None] == [], event


@pytest.mark.timeout(600)  # on a busy machine a rare event may take a while to happen
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_crashes_at_every_step(
    valkey: Valkey, tiny_model_dir: Path, nursery: Nursery, tmp_path: Path, requests: Requests, transport: str
) -> None:
    chance = random.Random(7)
    settings = {"kv_transport": transport, "ticket_lease_ms": LEASE_MS}
    async with forked_cluster_without_leaks(nursery, valkey.url, tiny_model_dir, tmp_path, **settings) as cluster:
        await cluster.start("prefill-1")
        await cluster.start("decode-1")
        for event in EVENTS:
            also = f",{SLOW}" if "renew" in event else ""
            victims = {f"{role}-0": f"kill={role}@{event}:1{also}" for role in ("prefill", "decode")}
            await asyncio.gather(*(cluster.start(victim, chaos=chaos) for victim, chaos in victims.items()))
            dying = asyncio.gather(*(cluster.until_gone(victim) for victim in victims))
            while not dying.done():
                await traffic(cluster, requests, chance, event)
            await dying
            await traffic(cluster, requests, chance, f"after {event}")
