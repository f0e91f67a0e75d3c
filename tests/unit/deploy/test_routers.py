"""Several routers behind one address are kept running: one that dies is started again, one that hangs is killed first."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deploy.launch import Programs
from deploy.probe import ask
from deploy.routers import Routers
from segue.config import RouterSettings
from segue.errors import StoreUnavailable
from segue.runtime import background
from segue.v1.worker_pb2 import RouterRecord

SETTINGS = RouterSettings(
    cluster_id="c",
    redis="redis://r",
    model_dir=Path("/m"),
    model_name="m",
    http_port=0,
    grpc_port=0,
    shares_ports=True,
    router_id="router-0",
)


class Store:
    """Stands for membership: tells whose leases hold, or does not answer."""

    def __init__(self) -> None:
        self.pids: set[int] | None = set()
        self.asked = asyncio.Event()

    async def list_routers(self) -> list[RouterRecord]:
        self.asked.set()
        if self.pids is None:
            raise StoreUnavailable("the store does not answer")
        return [RouterRecord(pid=pid) for pid in self.pids]

    async def was_asked(self, times: int = 3) -> None:
        for _ in range(times):
            self.asked.clear()
            await asyncio.wait_for(self.asked.wait(), 20)


@pytest.fixture
async def routers(stub_programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Routers]:
    """Two."""
    monkeypatch.setattr("deploy.router_process._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("deploy.routers._BETWEEN_LOOKS_S", 0.01)
    monkeypatch.setattr("deploy.routers._HUNG_S", 0.05)
    planned = [SETTINGS, SETTINGS.model_copy(update={"router_id": "router-1"})]
    routers = Routers(planned, tmp_path, stub_programs.router)
    await routers.start()
    try:
        await routers.serving()
        yield routers
    finally:
        await routers.stop()


async def test_all_listen_on_the_ports_of_the_first(routers: Routers) -> None:
    first, second = routers.processes
    assert (first.http, first.grpc) == (second.http, second.grpc) == (routers.http, routers.grpc)
    assert first.child.pid != second.child.pid
    first.child.signal(signal.SIGKILL)
    await first.child.exited
    assert (await asyncio.to_thread(ask, routers.http, "/ready")).is_ok, "the second answers"


async def test_one_that_dies_comes_back_and_the_other_stays(routers: Routers) -> None:
    notes, store = asyncio.Queue[str](), Store()
    first, second = routers.processes
    pids = first.child.pid, second.child.pid
    async with background(routers.keep(store, notes.put_nowait)):  # type: ignore[arg-type]
        os.kill(second.child.pid, signal.SIGKILL)
        assert (await asyncio.wait_for(notes.get(), 20)).startswith("router-1 was killed by SIGKILL, starting it again")
        assert await asyncio.wait_for(notes.get(), 20) == f"router-1 serves again, pid {second.child.pid}"
    assert first.child.pid == pids[0]
    assert second.child.pid != pids[1]
    assert second.http == first.http


async def test_one_whose_lease_lapses_is_killed_and_comes_back(routers: Routers) -> None:
    notes, store = asyncio.Queue[str](), Store()
    first, second = routers.processes
    both = {first.child.pid, second.child.pid}
    async with background(routers.keep(store, notes.put_nowait)):  # type: ignore[arg-type]
        await store.was_asked()
        assert notes.empty(), "a router that has no lease yet is starting"
        store.pids = both
        await store.was_asked()
        store.pids = None
        await store.was_asked(20)
        assert notes.empty(), "while the store is away nobody can renew a lease"
        store.pids = both
        await store.was_asked()
        store.pids = {first.child.pid}
        assert await asyncio.wait_for(notes.get(), 20) == "router-1 hangs; killing it"
        assert (await asyncio.wait_for(notes.get(), 20)).startswith("router-1 was killed by SIGKILL, starting it again")
        assert await asyncio.wait_for(notes.get(), 20) == f"router-1 serves again, pid {second.child.pid}"
    assert first.child.pid in both
    assert second.child.pid not in both
