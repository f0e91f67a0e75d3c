"""Ray, as the launcher sees it: one child process that owns it (deploy.ray_driver), and a short folder for its files."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from deploy.child import Child
from deploy.processes import is_alive
from deploy.ray_driver import DriverPlan

# Ray puts sockets in its folder, and the path of a socket may have 107 characters: so /tmp, and not a longer TMPDIR.
_TEMP_ROOT = Path("/tmp")  # mkdtemp makes the folder below it, for its owner alone
_TEMP_PREFIX = "segue-ray-"
# Ray takes 1.3 s to shut down on a quiet machine.
_STOP_S = 20.0

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# Ray would end workers when the *machine* runs short of memory, whoever uses it.
_LOCAL = {"RAY_memory_monitor_refresh_ms": "0", "RAY_AUTH_MODE": "token"}


@asynccontextmanager
async def ray_cluster(plan: DriverPlan, log: Path, on_line: Callable[[str], None]) -> AsyncIterator[Child]:
    """Ray with the plan's replicas, for as long as the block. Yields at once: the driver says on `on_line` when it serves.

    A local Ray is reached with a random token only; one at an address takes RAY_AUTH_MODE and RAY_AUTH_TOKEN as Ray does.
    """
    remove_stale_folders(_TEMP_ROOT)
    folder = Path(tempfile.mkdtemp(prefix=f"{_TEMP_PREFIX}{os.getpid()}-", dir=_TEMP_ROOT))
    try:
        env = dict(_QUIET) if plan.ray_address else _QUIET | _LOCAL | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
        child = await Child.start(
            "ray",
            [sys.executable, "-m", "deploy.ray_driver"],
            log=log,
            env=env,
            stdin=plan.with_temp_dir(str(folder)).to_json().encode(),
            on_line=on_line,
        )
        try:
            yield child
        finally:
            await child.stop(_STOP_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale_folders(root: Path) -> None:
    """Folders of launchers that were killed and could not remove them."""
    for folder in root.glob(f"{_TEMP_PREFIX}*"):
        pid = folder.name.removeprefix(_TEMP_PREFIX).partition("-")[0]
        try:
            is_ours = folder.stat().st_uid == os.getuid()
        except FileNotFoundError:  # another launcher removed it
            continue
        if is_ours and pid.isdigit() and not is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
