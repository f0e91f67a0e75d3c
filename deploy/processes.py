"""Processes of this host, as /proc tells them."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def resident_bytes(pid: int) -> int | None:
    """Memory that a process holds; None if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def is_alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie that waits to be reaped."""
    try:
        # The name, in parentheses, may hold anything; the state follows the last one.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def is_here(host: str) -> bool:
    """Whether a worker that gives `host` as its own runs on this machine."""
    return host in {socket.gethostname(), "localhost", "127.0.0.1", "::1"}


def usable_cores() -> int:
    """Cores that this process may keep busy: its affinity, and less where a cgroup has a CPU quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
