"""Processes of this host, as /proc tells them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def resident_bytes(pids: Iterable[int]) -> int:
    """Memory that these processes hold, together; pages that several of them share are counted for each."""
    num_pages = 0
    for pid in pids:
        with suppress(OSError):  # it is gone
            num_pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE")


def is_here(host: str) -> bool:
    """Whether a worker that gives `host` as its own runs on this machine."""
    return host in {socket.gethostname(), "localhost", "127.0.0.1", "::1"}


def limit_threads(number: int) -> None:
    """Of the numeric libraries in this process; they read it when they are loaded, which must come later."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(number)


def usable_cores() -> int:
    """Cores that this process may keep busy: its affinity, and less where a cgroup has a CPU quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
