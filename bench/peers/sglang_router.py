"""sglang-router in front of a prefill and a decode worker that compute nothing."""

from __future__ import annotations

import asyncio
import secrets
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import aiohttp

from bench.peers.catalog import peers_dir, venv_python, venv_stamp
from deploy.child import Child, FirstWord, log_tail
from segue.errors import ConfigError, DeadlineExceeded
from segue.paths import logs_dir

_START_S = 60.0
_STOP_S = 2.0
_BETWEEN_LOOKS_S = 0.1


@dataclass(frozen=True, slots=True)
class RunningPeer:
    # host:port of its HTTP API.
    address: str
    pid: int


@asynccontextmanager
async def sglang_router(step_ms: float) -> AsyncIterator[RunningPeer]:
    """Serves until the block ends. Raises ConfigError when it is not installed, DeadlineExceeded when it does not start."""
    venv = peers_dir() / "sglang_router"
    if not venv_stamp(venv).exists():
        raise ConfigError("sglang-router is not installed; run: python -m bench.peers setup")
    logs = logs_dir() / f"sglang-router-{secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:

        async def start(name: str, command: list[str], said: FirstWord | None = None) -> Child:
            on_line = said.on_line if said is not None else lambda _: None
            child = await Child.start(name, command, log=logs / f"{name}.log", on_line=on_line)
            stack.push_async_callback(child.stop, _STOP_S)
            return child

        backends = []
        # A prefill worker answers as soon as its prompt is computed, which takes no time.
        for role, role_step_ms in (("prefill", 0.0), ("decode", step_ms)):
            said = FirstWord()
            child = await start(role, [sys.executable, "-m", "bench.peers.fake_http", str(role_step_ms)], said)
            backends.append(f"http://{(await said.of(child))['http']}")
        port = _free_port()
        options = ["--pd-disaggregation", "--prefill", backends[0], "none", "--decode", backends[1], "--policy", "round_robin"]
        command = [str(venv_python(venv)), "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
        router = await start("sglang-router", [*command, "--prometheus-port", str(_free_port()), *options])
        await _until_ready(router, port)
        yield RunningPeer(f"127.0.0.1:{port}", router.pid)


async def _until_ready(router: Child, port: int) -> None:
    try:
        async with asyncio.timeout(_START_S), aiohttp.ClientSession() as http:
            body = {"model": "fake", "prompt": "x", "max_tokens": 2, "stream": True}
            while not router.exited.done():
                try:
                    async with http.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as response:
                        if response.status == 200 and b"[DONE]" in await response.read():
                            return
                except aiohttp.ClientError:
                    pass  # it does not listen yet
                await asyncio.sleep(_BETWEEN_LOOKS_S)
    except TimeoutError:
        raise DeadlineExceeded(f"sglang-router does not answer; the end of its log:\n{log_tail(router.log)}") from None
    raise router.died()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
