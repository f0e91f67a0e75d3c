"""The router, as a child of the launcher: started, brought back when it dies, stopped."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.child import Child, FirstWord
from segue.config import LOOPBACK, RouterSettings
from segue.errors import SegueError

ROUTER_COMMAND = (sys.executable, "-m", "router")
# A router lets streams that are under way go on for a moment.
STOP_S = 5.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0


class RouterProcess:
    """Built by `start`, which returns as soon as the process runs; `serving` waits until it serves."""

    def __init__(self, child: Child, said: FirstWord, settings: RouterSettings, command: Sequence[str]) -> None:
        self.child = child
        # Where clients reach it, host:port; known once `serving` has returned.
        self.http = ""
        self.grpc = ""
        self._said = said
        self._settings = settings
        self._command = command

    @property
    def name(self) -> str:
        return _name(self._settings)

    @classmethod
    async def start(cls, settings: RouterSettings, log: Path, command: Sequence[str] = ROUTER_COMMAND) -> RouterProcess:
        child, said = await _spawn(settings, log, command)
        return cls(child, said, settings, command)

    async def serving(self) -> None:
        """Raises what the router says is wrong, or the end of its log."""
        event = await self._said.of(self.child)
        self.http, self.grpc = reachable(str(event["http"])), reachable(str(event["grpc"]))

    async def keep(self, note: Callable[[str], None]) -> None:
        """Starts the router again whenever it dies, on the same ports; says so in one line. Runs until cancelled."""
        pause_s = _FIRST_PAUSE_S
        while True:
            started_s = time.monotonic()
            await asyncio.shield(self.child.exited)
            if time.monotonic() - started_s > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            note(f"{self.child.ending()}, starting it again; its log: {self.child.log}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            ports = {"http_port": port_of(self.http), "grpc_port": port_of(self.grpc)}
            again = self._settings.model_copy(update=ports)
            self.child, self._said = await _spawn(again, self.child.log, self._command)
            try:
                await self.serving()
            except SegueError as error:
                note(f"{self.name} did not come back: {error.message.splitlines()[0]}")
            else:
                note(f"{self.name} serves again, pid {self.child.pid}")

    async def stop(self) -> None:
        await self.child.stop(STOP_S)


def _name(settings: RouterSettings) -> str:
    return settings.router_id or "router"


async def _spawn(settings: RouterSettings, log: Path, command: Sequence[str]) -> tuple[Child, FirstWord]:
    said = FirstWord()
    return await Child.start(_name(settings), command, log=log, env=settings.to_env(), on_line=said.on_line), said


def reachable(address: str) -> str:
    """An address to connect to, for one that was listened on: every interface includes the loopback one."""
    host, _, port = address.rpartition(":")
    return f"{LOOPBACK}:{port}" if host in {"0.0.0.0", "[::]", "::", ""} else address


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])
