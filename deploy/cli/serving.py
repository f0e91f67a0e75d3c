"""What a person sees of `segue up`: the start, what runs where, a sample answer, and then what happens."""

from __future__ import annotations

import asyncio
import json
import time

from rich.console import Console
from rich.table import Table

from deploy.cli.console import new_console
from deploy.cli.sample import answer_sample
from deploy.cli.stages import StageDisplay
from deploy.cli.stopping import run_until_stopped
from deploy.cluster import Cluster, ProcessInfo
from deploy.launch import Launch
from segue.config import ClusterSettings
from segue.errors import SegueError

# Where nobody watches, lines keep a width that shows a table whole.
_PLAIN_WIDTH = 160


def serve(settings: ClusterSettings) -> int:
    """Runs a cluster until a stop signal; gives the exit code. Raises a SegueError when it cannot start or go on."""
    console = new_console()
    if not console.is_terminal:
        console.width = _PLAIN_WIDTH
    return asyncio.run(run_until_stopped(lambda: _serve(settings, console), console))


async def _serve(settings: ClusterSettings, console: Console) -> None:
    started_s = time.monotonic()
    with StageDisplay(console) as stages:
        launch = Launch(settings, stages.report)
        cluster = await launch.__aenter__()
    try:
        took_s = time.monotonic() - started_s
        console.print(process_table(await cluster.processes()))
        await _show_sample(cluster, console)
        _show_ways_in(cluster, took_s, console)
        await cluster.watch(lambda line: console.print(f"{time.strftime('%H:%M:%S')} {line}", markup=False))
    finally:
        await launch.__aexit__(None, None, None)


def process_table(processes: list[ProcessInfo]) -> Table:
    table = Table("process", "role", "pid", "address", box=None, header_style="bold", pad_edge=False)
    table.add_column("memory", justify="right")
    for info in processes:
        memory = "" if info.memory_bytes is None else f"{info.memory_bytes / 2**20:,.0f} MiB"
        table.add_row(info.name, info.role, str(info.pid), info.address, memory)
    return table


async def _show_sample(cluster: Cluster, console: Console) -> None:
    try:
        await answer_sample(cluster.grpc, console)
    except SegueError as error:  # the cluster is ready all the same, and its user may know better
        console.print(f"the sample prompt failed: {error.message}", style="yellow", markup=False)


def _show_ways_in(cluster: Cluster, took_s: float, console: Console) -> None:
    body = json.dumps({"model": cluster.model.name, "messages": [{"role": "user", "content": "Say hello."}]})
    lines = (
        f"serving {cluster.model.name} after {took_s:.1f} s: http://{cluster.http}/v1, gRPC {cluster.grpc}",
        f"curl http://{cluster.http}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        f"logs in {cluster.logs}",
        "Ctrl-C stops",
    )
    console.print("\n" + "\n".join(lines), markup=False)
