"""A whole launch under a real Ray, with stand-ins for router and workers: what is started, kept and left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deploy.child import Child
from deploy.launch import Launch, Programs
from deploy.progress import Stage
from deploy.ray_cluster import FOLDER_PREFIX, TEMP_ROOT
from deploy.sweeper import main as end_session_of
from deploy.sweeper import session_members
from deploy.valkey import free_port
from segue.config import ClusterSettings
from segue.errors import ConfigError, InternalError, StoreUnavailable
from segue.models.store import ModelHandle

SETTINGS = ClusterSettings(http_port=0, grpc_port=0, kv_memory=2**20)


@pytest.fixture(autouse=True)
def _no_model_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.launch.resolve", lambda name, progress: ModelHandle("stub", Path("/nowhere"), "r"))


def ray_folders() -> list[Path]:
    """Of launches by this process."""
    return list(TEMP_ROOT.glob(f"{FOLDER_PREFIX}{os.getpid()}-*"))


def command_lines(pids: list[int]) -> str:
    return " ".join(Path(f"/proc/{pid}/cmdline").read_text() for pid in pids)


async def test_a_cluster_from_start_to_end(stub_programs: Programs, children: Callable[[], set[int]]) -> None:
    stages: list[Stage] = []
    notes: asyncio.Queue[str] = asyncio.Queue()
    async with Launch(SETTINGS, stages.append, stub_programs) as cluster:
        assert [stage.name for stage in stages if stage.state == "done"][-1] == "ready"
        infos = {info.name: info for info in await cluster.processes()}
        assert list(infos) == ["router-0", "decode-0", "prefill-0", "ray", "valkey"]
        assert {info.pid for info in infos.values()} <= children()
        assert all(info.memory_bytes for info in infos.values())
        # Ray is as light as it can be.
        programs = command_lines(session_members(cluster.driver.pid))
        assert "gcs_server" in programs
        assert not [name for name in ("log_monitor", "monitor.py", "dashboard.py") if name in programs]
        watching = asyncio.create_task(cluster.watch(notes.put_nowait))

        # A worker that is killed comes back by itself, as a new epoch.
        first = {record.worker_id: record for record in await cluster.workers()}
        os.kill(first["decode-0"].pid, signal.SIGKILL)
        while "decode-0 was restarted" not in (note := await notes.get()):
            assert note.startswith("decode-0 is gone")
        again = {record.worker_id: record for record in await cluster.workers()}
        assert again["decode-0"].epoch > first["decode-0"].epoch
        assert again["prefill-0"] == first["prefill-0"]

        # One that is told to drain leaves for good.
        os.kill(again["prefill-0"].pid, signal.SIGTERM)
        assert {await notes.get(), await notes.get()} == {
            f"prefill-0 is gone, pid {again['prefill-0'].pid}",
            "prefill-0 drained and left",
        }
        watching.cancel()
        ray_session = cluster.driver.pid
        assert ray_folders()
    assert not children()
    assert not session_members(ray_session)
    assert not ray_folders()


async def test_a_worker_that_cannot_start_is_told_with_its_log(
    stub_programs: Programs, monkeypatch: pytest.MonkeyPatch, children: Callable[[], set[int]]
) -> None:
    monkeypatch.setenv("SEGUE_STUB_WORKER", "crash")
    with pytest.raises(InternalError, match=r"(?s)(decode|prefill)-0 died 2 times.*the stub is about to crash"):
        async with Launch(SETTINGS, programs=stub_programs):
            pytest.fail("it cannot have started")
    assert not children()
    assert not ray_folders()


async def test_a_router_that_cannot_start_ends_all(
    stub_programs: Programs, monkeypatch: pytest.MonkeyPatch, children: Callable[[], set[int]]
) -> None:
    monkeypatch.setenv("SEGUE_STUB_ROUTER", "refuse")
    with pytest.raises(ConfigError, match="the stub router does not like its settings"):
        async with Launch(SETTINGS, programs=stub_programs):
            pytest.fail("it cannot have started")
    assert not children()


async def test_a_start_that_is_cancelled_leaves_nothing(stub_programs: Programs, children: Callable[[], set[int]]) -> None:
    begun = asyncio.Event()

    def report(stage: Stage) -> None:
        if stage.name == "router":
            begun.set()

    async def launch() -> None:
        async with Launch(SETTINGS, report, stub_programs):
            pytest.fail("it was cancelled")

    starting = asyncio.create_task(launch())
    await begun.wait()
    assert len(children()) >= 3  # Valkey, Ray and router
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not children()
    assert not ray_folders()


@asynccontextmanager
async def small_ray(folder: Path) -> AsyncIterator[str]:
    """A Ray that runs already, with one core; its address."""
    address, is_up = f"127.0.0.1:{free_port()}", asyncio.Event()
    words = ["start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", address.rpartition(":")[2]]
    words += ["--temp-dir", str(folder), "--num-cpus", "1", "--include-dashboard=false", "--object-store-memory", "80000000"]

    def on_line(line: str) -> None:
        if "runtime started" in line:
            is_up.set()

    ray = str(Path(sys.executable).with_name("ray"))
    child = await Child.start("ray-head", (ray, *words), log=folder / "head.log", on_line=on_line)
    try:
        await is_up.wait()
        yield address
    finally:
        await child.stop(10.0)
        await asyncio.to_thread(end_session_of, child.pid, str(folder))


async def test_what_a_ray_cluster_has_no_room_for_is_told_while_it_is_waited_for(
    stub_programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    said: asyncio.Queue[str] = asyncio.Queue()

    async def launch(settings: ClusterSettings) -> None:
        async with Launch(settings, lambda stage: said.put_nowait(stage.detail), stub_programs):
            pytest.fail("there is no room for it")

    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="segue-test-", dir=TEMP_ROOT) as folder:
        async with small_ray(Path(folder)) as address:
            own = {"ray_address": address, "decode_resources": {"decode_node": 1.0}}
            starting = asyncio.create_task(launch(SETTINGS.model_copy(update=own)))
            try:
                # The other worker is placed meanwhile.
                while "no room yet for decode-0" not in (detail := await said.get()):
                    pass
            finally:
                starting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await starting
            assert "Ray has no room yet for decode-0: all 2 workers take 2 CPU, 1 decode_node" in detail
            assert "the whole cluster has 1 CPU, 0 decode_node; add nodes" in detail


async def test_a_store_that_does_not_answer_is_told_at_once(stub_programs: Programs, children: Callable[[], set[int]]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        settings = SETTINGS.model_copy(update={"redis": f"redis://127.0.0.1:{closed.getsockname()[1]}"})
        with pytest.raises(StoreUnavailable):
            await Launch(settings, programs=stub_programs).__aenter__()
    assert not children()


async def test_logs_of_a_clusters_earlier_life_are_kept(
    stub_programs: Programs, segue_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEGUE_STUB_ROUTER", "refuse")
    settings = SETTINGS.model_copy(update={"cluster_id": "mine"})
    for _ in range(3):
        with pytest.raises(ConfigError, match="the stub router does not like its settings"):
            await Launch(settings, programs=stub_programs).__aenter__()
    folders = [path for path in (segue_home / "logs").iterdir() if (path / "router-0.log").exists()]
    assert sorted(path.name.partition(".")[0] for path in folders) == ["mine"] * 3


async def test_logs_of_old_runs_are_dropped(stub_programs: Programs, segue_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_STUB_ROUTER", "refuse")
    for number in range(30):
        run = segue_home / "logs" / f"run{number}"
        run.mkdir(parents=True)
        os.utime(run, (number, number))
    with pytest.raises(ConfigError):
        await Launch(SETTINGS, programs=stub_programs).__aenter__()
    kept = sorted(os.listdir(segue_home / "logs"))
    assert len(kept) == 20
    assert "run29" in kept
    assert "run10" not in kept
