"""The router is started, brought back, stopped."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from deploy.launch import Programs
from deploy.probe import ask
from deploy.router_process import RouterProcess, reachable
from segue.config import RouterSettings
from segue.errors import ConfigError, InternalError

SETTINGS = RouterSettings(
    cluster_id="c", redis="redis://:secret@r", model_dir=Path("/m"), model_name="m", http_port=0, grpc_port=0
)


async def start(programs: Programs, tmp_path: Path) -> RouterProcess:
    return await RouterProcess.start(SETTINGS, tmp_path / "router.log", programs.router)


async def test_it_serves_where_it_says(stub_programs: Programs, tmp_path: Path) -> None:
    router = await start(stub_programs, tmp_path)
    try:
        await router.serving()
        answer = await asyncio.to_thread(ask, router.http, "/ready")
        assert answer.is_ok
        assert answer.fields()["ready"] is True
    finally:
        await router.stop()
    assert router.child.exited.result() == 0  # it was asked, not killed
    assert (await asyncio.to_thread(ask, router.http, "/ready")).status == 0


async def test_a_refusal_is_its_own_error(stub_programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_STUB_ROUTER", "refuse")
    router = await start(stub_programs, tmp_path)
    with pytest.raises(ConfigError, match="router: the stub router does not like its settings"):
        await router.serving()
    await router.stop()


async def test_a_death_is_told_with_the_log(stub_programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_STUB_ROUTER", "die")
    router = await start(stub_programs, tmp_path)
    with pytest.raises(InternalError, match=r"(?s)router exited with status 3.*the stub router dies"):
        await router.serving()
    await router.stop()


async def test_a_router_that_dies_comes_back_on_the_same_port(
    stub_programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.router_process._FIRST_PAUSE_S", 0.01)
    router = await start(stub_programs, tmp_path)
    notes: asyncio.Queue[str] = asyncio.Queue()
    try:
        await router.serving()
        http, pid = router.http, router.child.pid
        keeping = asyncio.create_task(router.keep(notes.put_nowait))
        os.kill(pid, signal.SIGKILL)
        assert (await notes.get()).startswith("router was killed by SIGKILL, starting it again")
        assert (await notes.get()) == f"router serves again, pid {router.child.pid}"
        assert (router.http, router.child.pid == pid) == (http, False)
        assert (await asyncio.to_thread(ask, http, "/ready")).is_ok
        keeping.cancel()
    finally:
        await router.stop()


def test_an_address_that_was_listened_on_is_made_one_to_connect_to() -> None:
    assert reachable("0.0.0.0:8000") == "127.0.0.1:8000"
    assert reachable("[::]:8000") == "127.0.0.1:8000"
    assert reachable("10.0.0.1:8000") == "10.0.0.1:8000"
