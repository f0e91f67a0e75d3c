"""One worker of a cluster that something else puts together, such as Kubernetes: all its ranks on this host.

Rank 0 is this process, the others are its children. They find each other as under Ray (deploy.ranks), and end together: a rank
that dies ends this process, whose end ends the others (deploy.tether). Whoever started this process starts it again.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from asyncio.subprocess import Process
from contextlib import suppress
from pathlib import Path

from deploy.worker import run_worker
from segue.config import WorkerSettings
from segue.errors import WorkerLost
from segue.runtime import background

_TETHER = Path(__file__).with_name("tether.py")


async def run_all_ranks(settings: WorkerSettings) -> None:
    """See deploy.worker.run_worker. Raises WorkerLost also when a rank ends that did not get as far as to be missed."""
    # Named anew at each start: no rank of an earlier one is let in.
    settings = settings.model_copy(update={"group": secrets.token_hex(8)})
    others = [await _start(settings, rank) for rank in range(1, settings.num_ranks)]
    try:
        async with background(*(_raise_when_it_fails(process, rank) for rank, process in enumerate(others, start=1))):
            await run_worker(settings)
    finally:
        for process in others:
            with suppress(ProcessLookupError):
                process.terminate()
        await asyncio.gather(*(process.wait() for process in others))


async def _start(settings: WorkerSettings, rank: int) -> Process:
    """It writes where this process does."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-I", "-S", str(_TETHER), str(os.getpid())),
        *(sys.executable, "-m", "deploy.worker"),
        env=os.environ | settings.model_copy(update={"rank": rank}).to_env(),
        stdin=asyncio.subprocess.DEVNULL,
    )


async def _raise_when_it_fails(process: Process, rank: int) -> None:
    if (code := await process.wait()) != 0:
        raise WorkerLost(f"rank {rank} ended with exit code {code}; what it wrote says why")
