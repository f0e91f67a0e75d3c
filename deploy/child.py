"""A process that the launcher starts, reads and ends; it never outlives the launcher.

What the child writes, on stdout and stderr, goes to one log file; each line of its stdout is also handed to `on_line`.
Children get a session of their own: a Ctrl-C at the terminal reaches the launcher alone, which stops them in its order.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from segue.errors import InternalError, SegueError, error_from_code

_TETHER = Path(__file__).with_name("tether.py")
_LONGEST_LINE = 2**20


class Child:
    """Built by `Child.start`. Ends by itself or through `stop`; `exited` is then done."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.pid = process.pid
        self.log = log
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._process = process
        self._pump_task: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        on_line: Callable[[str], None] = lambda line: None,
    ) -> Child:
        """`env` is added to this process's own environment. `stdin` is all that the child can read there."""
        log.parent.mkdir(parents=True, exist_ok=True)
        log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-I", "-S", str(_TETHER), str(os.getpid())),
                *command,
                env={**os.environ, **(env or {})},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log_fd,
                start_new_session=True,
                limit=_LONGEST_LINE,
            )
        except BaseException:
            os.close(log_fd)
            raise
        child = cls(name, process, log)
        child._pump_task = asyncio.create_task(child._pump(log_fd, on_line))
        assert process.stdin is not None
        with suppress(BrokenPipeError, ConnectionResetError):  # a child that died at once; `exited` tells
            process.stdin.write(stdin)
            await process.stdin.drain()
        process.stdin.close()
        return child

    async def _pump(self, log_fd: int, on_line: Callable[[str], None]) -> None:
        """Copies stdout to the log until the child closes it, then waits for the child's end."""
        assert self._process.stdout is not None
        with os.fdopen(log_fd, "ab", buffering=0) as log:
            async for line in self._process.stdout:
                log.write(line)
                on_line(line.decode(errors="replace").rstrip("\n"))
        self.exited.set_result(await self._process.wait())

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL for a child that is still there after `grace_s`."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await asyncio.shield(self.exited)
        except TimeoutError:
            pass
        finally:
            self.signal(signal.SIGKILL)
        await asyncio.shield(self.exited)

    def died(self) -> SegueError:
        """How the child ended, with the end of its log."""
        return InternalError(f"{self.ending()}; the end of its log, {self.log}:\n{log_tail(self.log)}")

    def ending(self) -> str:
        status = self.exited.result()
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        return f"{self.name} {how}"


class FirstWord:
    """The line of JSON in which a process says that it serves, or why it does not (see segue.runtime)."""

    def __init__(self) -> None:
        self._said: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    def on_line(self, line: str) -> None:
        if (event := parse_event(line)) is not None and not self._said.done():
            self._said.set_result(event)

    async def of(self, child: Child) -> dict[str, Any]:
        """The `serving` event. Raises the child's own error if it failed or died without a word."""
        await first_of(self._said, child.exited)
        if not self._said.done():
            raise child.died()
        event = self._said.result()
        if event["event"] == "failed":
            raise error_from_code(str(event.get("code")), f"{child.name}: {event.get('error')}")
        return event


async def first_of(*futures: asyncio.Future[Any]) -> None:
    """Returns when one of them is done; the others go on."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def parse_event(line: str) -> dict[str, Any] | None:
    """A line of stdout that is an event; None for any other output."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def log_tail(log: Path, max_lines: int = 20) -> str:
    """The last lines of a log file, indented; empty if there is none."""
    try:
        lines = log.read_bytes()[-16_384:].decode(errors="replace").splitlines()
    except OSError:
        return "  (no log)"
    return "\n".join(f"  {line}" for line in lines[-max_lines:]) or "  (empty)"
