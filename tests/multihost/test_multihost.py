"""Hosts come, go and are cut off while clients ask: no request fails, and every answer has the tokens that it has to have."""

from __future__ import annotations

import pytest

from segue.runtime import background
from tests.multihost.conftest import Load, MultiHost

pytestmark = pytest.mark.timeout(300)


async def test_prefill_and_decode_are_on_different_hosts(multihost: MultiHost) -> None:
    workers = await multihost.workers()
    places = {worker_id: multihost.host_of(worker) for worker_id, worker in workers.items()}
    assert len(set(places.values())) == len(workers) == 4, places
    assert all(place.startswith(worker_id.partition("-")[0]) for worker_id, place in places.items()), places
    assert {worker["host"] for worker in workers.values()} == set(places.values())
    async with multihost.load() as load:
        endings = await load.some_more(60)
    assert {ending.transport for ending in endings} == {"tcp"}
    assert {ending.prefill for ending in endings} | {ending.decode for ending in endings} == set(workers)


async def test_a_host_that_is_cut_off_for_a_while(multihost: MultiHost) -> None:
    """Too short for Ray to give it up: the worker that was there serves again, and is the same."""
    before = await multihost.until("decode-0", state="ready")
    host = multihost.hosts[multihost.host_of(before)]
    async with multihost.load() as load:
        host.cut_off()
        await multihost.until_away("decode-0")
        await _only_from(load, "decode-1")
        host.take_back()
        back = await multihost.until("decode-0", state="ready")
        assert (back["epoch"], back["address"]) == (before["epoch"], before["address"])
        await multihost.until("decode-0", state="ready", decoded_above=back["load"]["decoded_tokens"])
    assert max(ending.attempts for ending in load.endings) > 1, "some requests were there when it was cut off"


async def test_a_host_that_is_lost_has_its_worker_moved(multihost: MultiHost) -> None:
    before = await multihost.until("decode-1", state="ready")
    lost = multihost.host_of(before)
    async with multihost.load() as load:
        multihost.hosts[lost].power_off()
        moved = await multihost.until("decode-1", state="ready", epoch_above=before["epoch"])
        assert multihost.host_of(moved) not in {lost, multihost.host_of((await multihost.workers())["decode-0"])}
        await multihost.until("decode-1", decoded_above=moved["load"]["decoded_tokens"])
    assert max(ending.attempts for ending in load.endings) > 1
    await multihost.boot(lost)


async def test_a_host_that_was_given_up_comes_back(multihost: MultiHost) -> None:
    """Its worker was moved meanwhile. What is left of the old one must not take the new one's place."""
    before = await multihost.until("decode-0", state="ready")
    cut = multihost.host_of(before)
    async with multihost.load():
        multihost.hosts[cut].cut_off()
        moved = await multihost.until("decode-0", state="ready", epoch_above=before["epoch"])
        assert multihost.host_of(moved) != cut
        multihost.hosts[cut].take_back()
        async with background(_no_epoch_comes_back(multihost, "decode-0", moved["epoch"])):
            # Ray there learns that it was given up, and ends; whoever keeps the host starts it anew.
            await multihost.ray[cut].ended()
            await multihost.start_ray(cut)
        after = await multihost.until("decode-0", state="ready")
        assert (after["epoch"], after["address"]) == (moved["epoch"], moved["address"])


async def test_a_rolling_restart_under_load(multihost: MultiHost) -> None:
    before = await multihost.workers()
    async with multihost.load():
        said = await multihost.segue("restart", "--rolling")
    assert all(f"{worker_id} serves again" in said for worker_id in before)
    after = await multihost.workers()
    assert after.keys() == before.keys()
    assert all(after[name]["epoch"] > before[name]["epoch"] and after[name]["state"] == "ready" for name in before)


async def test_scaling_to_where_there_is_room_and_beyond(multihost: MultiHost) -> None:
    """There are three nodes for decode workers. The fourth worker waits, and what it waits for is told."""
    async with multihost.load():
        said = await multihost.segue("scale", "decode=4", "--within=20s", status=1)
        assert "Ray has no room yet for decode-3: all 6 workers take 6 CPU, 4 decode_node" in said
        assert "the whole cluster has 5 CPU, 3 decode_node" in said
        await multihost.until("decode-2", state="ready")
        assert "2 prefill and 2 decode workers serve" in await multihost.segue("scale", "decode=2")
    await multihost.until_away("decode-2")
    assert "decode-3" not in await multihost.workers(), "it must not have taken the place that became free"


async def _only_from(load: Load, worker_id: str) -> None:
    """Waits for requests that were begun after now, all answered by this worker."""
    while {ending.decode for ending in await load.some_more()} != {worker_id}:
        pass


async def _no_epoch_comes_back(multihost: MultiHost, worker_id: str, newest: int) -> None:
    while True:
        worker = (await multihost.workers()).get(worker_id)
        assert worker is None or worker["epoch"] >= newest, worker
