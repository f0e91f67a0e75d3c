"""Starts workers and routers quickly: a process that has loaded all that they import, and forks.

Each line of its stdin is the environment of one process, in JSON, to which it answers with the pid in a line of its own. They
are real processes, `deploy.worker` and `router` to the letter, but for the seconds that imports take. They end with this one.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deploy.worker import main as serve_as_worker
from router.__main__ import main as serve_as_router
from segue.config import RouterSettings, WorkerSettings
from segue.runtime import run_process

_PR_SET_PDEATHSIG = 1
_PROGRAM = "SEGUE_NURSERY_PROGRAM"
_LOG = "SEGUE_NURSERY_LOG"


@dataclass
class Nursery:
    """The other end of the process."""

    process: asyncio.subprocess.Process
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def start(self, settings: WorkerSettings | RouterSettings, log: Path) -> int:
        """Gives the pid. What the process says is added to `log`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        program = "worker" if isinstance(settings, WorkerSettings) else "router"
        env = settings.to_env() | {_PROGRAM: program, _LOG: str(log), "OMP_NUM_THREADS": "1"}
        async with self._turn:
            self.process.stdin.write(json.dumps(env).encode() + b"\n")
            return int(await self.process.stdout.readline())


@asynccontextmanager
async def running_nursery() -> AsyncIterator[Nursery]:
    """All that it started ends when the block does."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.nursery", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield Nursery(process)
    finally:
        process.kill()
        await process.communicate()


def _serve_as(env: Mapping[str, str]) -> int:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(env)
    with open(env[_LOG], "a") as log:  # what it says on stdout and stderr
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    return run_process(serve_as_worker if env[_PROGRAM] == "worker" else serve_as_router)


def main() -> None:

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    gc.freeze()
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            os._exit(_serve_as(json.loads(line)))
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
