"""One worker process started as a cluster starts it: how long until it serves, and how much memory it then takes."""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from deploy.child import Child, FirstWord
from deploy.plan import plan_workers
from deploy.valkey import embedded_valkey
from segue.config import ClusterSettings
from segue.models.store import ModelHandle
from segue.paths import logs_dir

_START_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class WorkerStart:
    # From the start of the process until it takes requests.
    ready_s: float
    # Resident memory, in MB (10^6 bytes), as it is when all of its KV cache is in use.
    rss_mb: float


async def start_worker(model: ModelHandle, settings: ClusterSettings) -> WorkerStart:
    """Starts the first worker that `settings` plans, and ends it again."""
    logs = logs_dir() / f"bench-worker-{secrets.token_hex(4)}"
    async with embedded_valkey(logs / "valkey.log") as valkey:
        worker = plan_workers(settings, cluster_id="bench", redis=valkey.url, model=model, num_cores=settings.threads)[0]
        said = FirstWord()
        env = worker.to_env() | {"OMP_NUM_THREADS": str(worker.threads)}
        begin_s = time.perf_counter()
        command = (sys.executable, "-m", "deploy.worker")
        process = await Child.start(worker.worker_id, command, log=logs / "worker.log", env=env, on_line=said.on_line)
        try:
            async with asyncio.timeout(_START_LIMIT_S):
                await said.of(process)
            ready_s = time.perf_counter() - begin_s
            return WorkerStart(ready_s, (_private_bytes(process.pid) + worker.kv_memory) / 1e6)
        finally:
            await process.stop(5.0)


def _private_bytes(pid: int) -> int:
    """Resident bytes without shared memory, which holds the KV cache: pages of it that nobody has used yet are not there."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))
