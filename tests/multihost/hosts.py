"""Hosts: each with a network address, a name, process ids, /dev/shm and /mnt of its own. To others it is another machine."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.support.network import Network

# The first process of a host: it buries those whose parents are gone.
_INIT = (
    "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print(flush=True); [signal.pause() for _ in iter(int, 1)]"
)
_SCRIPT = 'set -e; hostname "$0"; mount -t tmpfs tmpfs /dev/shm; mount -t tmpfs tmpfs /mnt; exec python3 -I -S -c "$1"'
_NAMESPACES = ("--mount", "--uts", "--pid")


class Host:
    def __init__(self, network: Network, name: str) -> None:
        self.name = name
        self.place = network.plug_in()
        self.address = self.place.address
        self._network = network
        self._first: subprocess.Popen[bytes] | None = None

    def boot(self) -> None:
        own = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", _SCRIPT, self.name, _INIT]
        words = ["ip", "netns", "exec", self.place.namespace, *own]
        self._first = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
        assert self._first.stdout is not None
        assert self._first.stdout.readline(), f"{self.name} did not boot"

    def power_off(self) -> None:
        """With all that runs there."""
        if self._first is not None:
            self._first.kill()
            self._first.communicate()
            self._first = None

    def cut_off(self) -> None:
        self._network.cut_off(self.place)

    def take_back(self) -> None:
        self._network.take_back(self.place)

    async def start(self, *command: str, env: Mapping[str, str], stdin: bytes | None = None, log: Path) -> Program:
        assert self._first is not None
        (first,) = _children(self._first.pid)
        process = await asyncio.create_subprocess_exec(
            *("nsenter", "--target", str(first), "--net", *_NAMESPACES, "--", *command),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, **env},
            start_new_session=True,
        )
        if stdin is not None:
            assert process.stdin is not None
            process.stdin.write(stdin)
            process.stdin.close()
        return Program(process, log)


class Program:
    """One that runs on a host, and what it has printed."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.lines: list[str] = []
        self._log = log
        self._said = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        with self._log.open("a") as log:
            async for raw in self.process.stdout:
                self.lines.append(raw.decode(errors="replace").rstrip())
                log.write(self.lines[-1] + "\n")
                log.flush()
                self._said.set()
        await self.process.wait()
        self._said.set()

    async def line_with(self, pattern: str, *, after: int = 0) -> str:
        """The first line that has `pattern`, of those after so many. Fails at the end of the output."""
        while True:
            self._said.clear()
            for line in self.lines[after:]:
                if re.search(pattern, line):
                    return line
            if self._reading.done():
                raise AssertionError("\n".join([f"it ended with {self.process.returncode}:", *self.lines[-40:]]))
            await self._said.wait()

    async def ended(self) -> int:
        await asyncio.shield(self._reading)
        assert self.process.returncode is not None
        return self.process.returncode

    def signal(self, number: signal.Signals) -> None:
        """Of the program itself; nsenter, which waits for it, passes none on."""
        with suppress(OSError):
            for child in _children(self.process.pid):
                os.kill(child, number)


def _children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
