"""The membership store goes away: serving goes on with the workers that are known."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from deploy.valkey import embedded_valkey
from router.workers import ABSENCE_GRACE_S, MEMBERSHIP_INTERVAL_S
from segue import GenerateOptions
from tests.support.cluster import in_process_cluster

SHORT = GenerateOptions(max_tokens=8, temperature=0.0, ignore_eos=True)


async def test_serving_goes_on_without_the_store(tmp_path: Path, tiny_model_dir: Path) -> None:
    async with embedded_valkey(tmp_path / "valkey.log") as valkey:
        async with in_process_cluster(valkey.url, tiny_model_dir, member_lease_ms=600) as cluster:
            before = await cluster.client.generate("Hello", **SHORT)
            valkey.child.signal(signal.SIGKILL)
            await valkey.child.exited
            # Longer than leases hold and absence is forgiven: nothing may be concluded from silence.
            await asyncio.sleep(0.6 + ABSENCE_GRACE_S + 2 * MEMBERSHIP_INTERVAL_S)
            status = await cluster.client.status()
            assert not status.membership_fresh
            assert {worker.state for worker in status.workers} == {"ready"}
            assert (await cluster.client.generate("Hello", **SHORT)).token_ids == before.token_ids
