"""A worker without an engine: announces itself, serves nothing, drains at once. What it does wrong, SEGUE_STUB_WORKER says."""

import os
import signal
import socket
import sys

from segue.config import WorkerSettings
from segue.errors import ConfigError
from segue.membership import Membership, held_lease
from segue.runtime import stop_event
from segue.v1.worker_pb2 import WorkerRecord


async def run_worker(settings: WorkerSettings) -> None:
    stop = stop_event()
    match os.environ.get("SEGUE_STUB_WORKER"):
        case "refuse":
            raise ConfigError("kv_memory: too small for the stub")
        case "crash":
            sys.stderr.write("the stub is about to crash\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        case "bug":
            raise ZeroDivisionError("a bug in the stub")
    async with Membership(settings.redis, settings.cluster_id) as membership:
        record = WorkerRecord(
            worker_id=settings.worker_id,
            epoch=await membership.next_epoch(),
            roles=settings.roles,
            address=f"{settings.host}:1",
            pid=os.getpid(),
            host=socket.gethostname(),
        )
        async with held_lease(membership, lambda: record, settings.member_lease_ms):
            await stop.wait()
