"""`python -m bench.startup`: how long each part of `segue up` takes until the first token, and what Ray's processes hold.

A Ray of the cluster's own (embedded) and one that runs already (`ray start --head`, as --ray-address takes it) are started in
turns. Times count from the start of the launch; router, Ray and workers start side by side, so that they do not add up.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.machine import commit, machine_facts
from bench.report import Report, median_row, print_report, write_json
from deploy.child import Child
from deploy.cluster import Cluster
from deploy.launch import Launch
from deploy.progress import Stage
from deploy.ray_cluster import TEMP_ROOT
from deploy.sweeper import main as end_session_of
from deploy.sweeper import session_members
from deploy.valkey import free_port
from segue.client import AsyncClient
from segue.config import DEFAULT_MODEL, LOOPBACK, ClusterSettings

_OBJECT_STORE_BYTES = 80 * 2**20
Runs = dict[str, list[float]]


def main(
    model: Annotated[str, typer.Option(help="As segue up takes it.")] = DEFAULT_MODEL,
    runs: Annotated[int, typer.Option(min=1, help="Starts of each kind.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report here.")] = None,
) -> None:
    """Measure the start of a cluster: a Ray of its own beside one that runs already, in turns."""
    console = Console(stderr=True)
    measured: Runs = defaultdict(list)
    for number in range(1, runs + 1):
        for kind in ("embedded", "joined"):
            console.print(f"start {number} of {runs}, Ray {kind}")
            asyncio.run(_measure(kind, model, measured))
    rows = [median_row(name, name.rpartition("_")[2].replace("mb", "MB"), values) for name, values in measured.items()]
    report = Report(machine_facts(), commit(), rows)
    print_report(report)
    if json_file is not None:
        write_json(report, json_file)


async def _measure(kind: str, model: str, measured: Runs) -> None:
    settings = ClusterSettings(model=model, http_port=0, grpc_port=0)
    async with AsyncExitStack() as stack:
        sessions: list[int] = []
        if kind == "joined":
            began_s = time.monotonic()
            head, address = await stack.enter_async_context(_running_ray())
            measured["joined_ray_head_s"].append(time.monotonic() - began_s)
            sessions.append(head.pid)
            settings = settings.model_copy(update={"ray_address": address})
        began_s = time.monotonic()

        def note(stage: Stage) -> None:
            if stage.state == "done":
                done_s[stage.name] = time.monotonic() - began_s

        done_s: dict[str, float] = {}
        cluster = await stack.enter_async_context(Launch(settings, note))
        await _first_token(cluster)
        done_s["first_token"] = time.monotonic() - began_s
        for name, seconds in done_s.items():
            measured[f"{kind}_{name}_s"].append(seconds)
        workers = {record.pid for record in await cluster.workers()}
        held = defaultdict[str, float](float)
        for pid in {pid for session in (*sessions, cluster.driver.pid) for pid in session_members(session)} - workers:
            held[_program(pid)] += _held_mb(pid)
        for name, megabytes in sorted(held.items()):
            measured[f"{kind}_{name}_mb"].append(megabytes)
        measured[f"{kind}_all_of_ray_mb"].append(sum(held.values()))


async def _first_token(cluster: Cluster) -> None:
    async with AsyncClient(cluster.grpc) as client:
        await client.generate("Hello", max_tokens=1, temperature=0.0)


@asynccontextmanager
async def _running_ray() -> AsyncIterator[tuple[Child, str]]:
    """A Ray of one node, ended with all its processes."""
    with tempfile.TemporaryDirectory(prefix="segue-bench-", dir=TEMP_ROOT) as folder:
        address, is_up = f"{LOOPBACK}:{free_port()}", asyncio.Event()
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        words = ["start", "--head", "--block", "--node-ip-address", LOOPBACK, "--port", address.rpartition(":")[2]]
        words += ["--temp-dir", folder, "--object-store-memory", str(_OBJECT_STORE_BYTES), "--include-dashboard=false"]

        def on_line(line: str) -> None:
            if "runtime started" in line:
                is_up.set()

        ray = str(Path(sys.executable).with_name("ray"))
        child = await Child.start("ray-head", (ray, *words), log=Path(folder) / "head.log", on_line=on_line)
        try:
            await is_up.wait()
            yield child, address
        finally:
            await child.stop(10.0)
            await asyncio.to_thread(end_session_of, child.pid, folder)


def _program(pid: int) -> str:
    """A short name for what the process runs."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    known = ("gcs_server", "raylet", "log_monitor", "runtime_env", "dashboard/agent", "dashboard", "monitor", "ray_driver")
    return next(
        (name.replace("/", "_") for name in known for word in words[:3] if name in word), Path(words[0]).name or "other"
    )


def _held_mb(pid: int) -> float:
    """Proportional set size: a page that several processes share is counted once in all."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    typer.run(main)
