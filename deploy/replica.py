"""One worker replica, or a rank of one, as a Ray actor. Ray places it; no request passes through Ray.

The actor has one task, `run`, which serves on the process's main thread for as long as the worker lives. When the process dies,
it is run again in another: a new epoch of the same worker. A task that returns (the worker was told to drain, or cannot work)
ends the replica, and its driver decides what comes next.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypedDict

from deploy.processes import limit_threads
from segue.config import WorkerSettings
from segue.errors import SegueError
from segue.logs import set_up_logging
from segue.paths import logs_dir

logger = logging.getLogger(__name__)

START_MARK = "=== segue worker"


class Outcome(TypedDict):
    """How a run ended; plain data, so that nothing of it can fail to unpickle."""

    drained: bool
    # Drained to be started anew.
    again: bool
    code: str
    error: str


def worker_log(cluster_id: str, worker_id: str, rank: int = 0) -> Path:
    """Where a rank of a replica writes, on the host that it runs on."""
    return logs_dir() / cluster_id / (f"{worker_id}.rank{rank}.log" if rank else f"{worker_id}.log")


def num_starts(log: Path) -> int:
    """How many processes of a worker have begun; 0 where the log is on another host."""
    try:
        return log.read_text(errors="replace").count(START_MARK)
    except OSError:
        return 0


class Replica:
    """Made into an actor by the driver, which knows its resources."""

    def __init__(self, settings_json: str, spread: bool) -> None:
        settings = WorkerSettings.model_validate_json(settings_json)
        self._settings = settings.model_copy(update={"host": _node_address()}) if spread else settings
        limit_threads(self._settings.threads)
        _redirect_output(worker_log(self._settings.cluster_id, self._settings.worker_id, self._settings.rank))
        set_up_logging(self._settings.log_format, worker_id=self._settings.worker_id)

    def run(self, entry: str) -> Outcome:
        """Serves through `entry` ("module:coroutine function", which says whether to start it anew) until told to stop."""
        import uvloop

        logger.info("%s %s, pid %d", START_MARK, self._settings.worker_id, os.getpid())
        try:
            again = uvloop.run(_serve(entry, self._settings))
        except SegueError as error:
            logger.error("%s", error.message)
            return Outcome(drained=False, again=True, code=error.code, error=error.message)
        return Outcome(drained=True, again=again, code="", error="")


async def _serve(entry: str, settings: WorkerSettings) -> bool:
    module, _, function = entry.partition(":")
    serve: Callable[[WorkerSettings], Awaitable[bool]] = getattr(importlib.import_module(module), function)
    return await serve(settings)


def _node_address() -> str:
    """The address at which other nodes of the Ray cluster reach this one."""
    import ray

    return str(ray.util.get_node_ip_address())


def _redirect_output(log: Path) -> None:
    """Sends this process's stdout and stderr, also those of native code, to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
