"""Ray, as the launcher sees it: one child process that owns it (deploy.ray_driver), and a short folder for its files."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from deploy.child import Child
from deploy.driver_plan import DriverPlan

# Ray puts sockets in its folder, and the path of a socket may have 107 characters: so /tmp, and not a longer TMPDIR.
TEMP_ROOT = Path("/tmp")  # mkdtemp makes the folder below it, for its owner alone
FOLDER_PREFIX = "segue-ray-"
_SWEEPER = Path(__file__).with_name("sweeper.py")
# Ray takes 1.3 s to shut down on a quiet machine.
_STOP_S = 20.0

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# Ray would end workers when the *machine* runs short of memory, whoever uses it.
_LOCAL = {
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_AUTH_MODE": "token",
    # Ray's servers listen on loopback only; under its own name for it, a Ray that no other node can join.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


@asynccontextmanager
async def ray_cluster(plan: DriverPlan, log: Path, on_line: Callable[[str], None]) -> AsyncIterator[Child]:
    """Ray with the plan's replicas, for as long as the block. Yields at once: the driver says on `on_line` when it serves.

    A local Ray is reached with a random token only; one at an address takes RAY_AUTH_MODE and RAY_AUTH_TOKEN as Ray does.
    At the end not one process of a local Ray is left, nor its folder.
    """
    folder = tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=TEMP_ROOT)
    env = dict(_QUIET) if plan.ray_address else _QUIET | _LOCAL | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, "-m", "deploy.ray_driver"]
    stdin = plan.with_temp_dir(folder).to_json().encode()
    child = await Child.start("ray", command, log=log, env=env, stdin=stdin, on_line=on_line)
    sweeper = None
    try:
        sweeper = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", str(_SWEEPER), str(child.pid), folder, start_new_session=True
        )
        yield child
    finally:
        await child.stop(_STOP_S)
        if sweeper is not None:
            await sweeper.wait()
