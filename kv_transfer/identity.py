"""Who a worker is, and which host its process runs on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from segue.v1 import transfer_pb2 as pb


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """`epoch` grows each time the worker starts; workers exchange KV only when their fingerprints are equal."""

    worker_id: str
    epoch: int
    layout_fingerprint: str


def process_start_time(pid: int) -> int:
    """When the process started, in clock ticks since boot. With the pid it names a process for good, as pids are used again.

    Raises ProcessLookupError when there is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None
    # The second field is the command in brackets and may hold anything; the 22nd is the start time.
    return int(stat.rpartition(")")[2].split()[19])


def host_identity() -> pb.HostIdentity:
    """This process, as another on the same host would find it."""
    pid = os.getpid()
    return pb.HostIdentity(
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        pid_namespace=os.readlink("/proc/self/ns/pid"),
        pid=pid,
        pid_start_time=process_start_time(pid),
    )


def same_host(a: pb.HostIdentity, b: pb.HostIdentity) -> bool:
    """Whether the two processes run on one kernel and see each other's pids."""
    return bool(a.boot_id) and (a.boot_id, a.pid_namespace) == (b.boot_id, b.pid_namespace)
