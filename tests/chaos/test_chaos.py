"""The short form of `python -m bench.chaos`: processes are killed, stopped and cut off, and no client notices."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.aborts import Held
from bench.chaos import CORRUPT, measure
from bench.forked_cluster import forked_cluster
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
