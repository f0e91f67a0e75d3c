"""The embedded Valkey answers those who have its URL, keeps nothing and leaves nothing."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import redis.asyncio as redis_client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError

from deploy import valkey as valkey_module
from deploy.valkey import embedded_valkey
from segue.errors import StoreUnavailable


def read(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


async def test_it_answers_with_the_password_only(tmp_path: Path) -> None:
    async with embedded_valkey(tmp_path / "log") as valkey:
        async with redis_client.Redis.from_url(valkey.url) as client:
            assert await client.ping()
            assert (await client.config_get("save"))["save"] == ""
            assert (await client.config_get("bind"))["bind"] == "127.0.0.1"
        async with redis_client.Redis(port=valkey.port, retry=Retry(NoBackoff(), 0)) as stranger:
            with pytest.raises(AuthenticationError):
                await stranger.ping()


async def test_the_password_shows_in_no_process_list_and_no_log(tmp_path: Path) -> None:
    async with embedded_valkey(tmp_path / "log") as valkey:
        password = valkey.url.removeprefix("redis://:").partition("@")[0]
        assert len(password) > 30
        for name in ("cmdline", "environ"):
            assert password not in read(Path(f"/proc/{valkey.child.pid}/{name}"))
    assert password not in read(tmp_path / "log")


async def test_it_is_gone_with_its_block_and_leaves_only_its_log(tmp_path: Path, children: Callable[[], set[int]]) -> None:
    async with embedded_valkey(tmp_path / "log") as valkey:
        assert valkey.child.pid in children()
    assert not children()
    assert os.listdir(tmp_path) == ["log"]


async def test_two_at_a_time_do_not_meet(tmp_path: Path) -> None:
    async with embedded_valkey(tmp_path / "1") as first, embedded_valkey(tmp_path / "2") as second:
        async with redis_client.Redis.from_url(first.url) as client:
            await client.set("key", "value")
        async with redis_client.Redis.from_url(second.url) as client:
            assert await client.get("key") is None


async def test_a_taken_port_is_tried_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with embedded_valkey(tmp_path / "1") as first:
        ports = iter((first.port, valkey_module.free_port()))
        monkeypatch.setattr(valkey_module, "free_port", lambda: next(ports))
        async with embedded_valkey(tmp_path / "2") as second:
            assert second.port != first.port


async def test_a_binary_that_does_not_run_is_told_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: Callable[[], set[int]]
) -> None:
    broken = tmp_path / "valkey-server"
    broken.write_text("#!/bin/sh\necho wrong kind of processor >&2\nexit 4\n")
    broken.chmod(0o755)
    monkeypatch.setattr(valkey_module, "server_binary", lambda: broken)
    with pytest.raises(StoreUnavailable, match=r"(?s)status 4.*wrong kind of processor"):
        async with embedded_valkey(tmp_path / "log"):
            pytest.fail("it cannot have started")
    assert not children()
