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
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from deploy.worker import run_worker
from segue.config import WorkerSettings
from segue.errors import ConfigError, WorkerLost
from segue.runtime import background

_TETHER = Path(__file__).with_name("tether.py")


async def run_all_ranks(settings: WorkerSettings) -> None:
    """See deploy.worker.run_worker. Raises WorkerLost also when a rank ends that did not get as far as to be missed."""
    # Named anew at each start: no rank of an earlier one is let in.
    settings = settings.model_copy(update={"group": secrets.token_hex(8)})
    others = [await _start(settings, rank) for rank in range(1, settings.num_ranks)]
    os.environ |= gpu_env(settings, 0, os.environ)
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
        env=os.environ | settings.model_copy(update={"rank": rank}).to_env() | gpu_env(settings, rank, os.environ),
        stdin=asyncio.subprocess.DEVNULL,
    )


def gpu_env(settings: WorkerSettings, rank: int, env: Mapping[str, str]) -> dict[str, str]:
    """Lets each of several ranks see one GPU of its own, among those that `env` lets this process see. Not run on hardware."""
    if settings.device != "cuda" or settings.num_ranks == 1:
        return {}
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(number) for number in range(settings.num_ranks)]
    if len(gpus) < settings.num_ranks:
        raise ConfigError(f"{settings.num_ranks_field}: {settings.num_ranks} ranks need as many GPUs, not those of {visible!r}")
    return {"CUDA_VISIBLE_DEVICES": gpus[rank]}


async def _raise_when_it_fails(process: Process, rank: int) -> None:
    if (code := await process.wait()) != 0:
        raise WorkerLost(f"rank {rank} ended with exit code {code}; what it wrote says why")
