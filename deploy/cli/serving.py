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
from deploy.probe import own_grpc
from segue.client import Access
from segue.config import LOOPBACK_NAMES, ClusterSettings
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
        await _show_sample(cluster, settings, console)
        _show_ways_in(cluster, settings, took_s, console)
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


async def _show_sample(cluster: Cluster, settings: ClusterSettings, console: Console) -> None:
    if settings.api_keys_file is not None and Access.from_env().api_key is None:
        return
    try:
        await answer_sample(own_grpc(cluster.grpc, settings), console)
    except SegueError as error:  # the cluster is ready all the same, and its user may know better
        console.print(f"the sample prompt failed: {error.message}", style="yellow", markup=False)


def _show_ways_in(cluster: Cluster, settings: ClusterSettings, took_s: float, console: Console) -> None:
    site = f"{'http' if settings.tls_cert is None else 'https'}://{cluster.http}"
    url = f"{site}/v1"
    key = "" if settings.api_keys_file is None else ' -H "Authorization: Bearer $SEGUE_API_KEY"'
    body = json.dumps({"model": cluster.model.name, "messages": [{"role": "user", "content": "Say hello."}]})
    lines = (
        f"serving {cluster.model.name} after {took_s:.1f} s: {url}, gRPC {own_grpc(cluster.grpc, settings)}",
        f"curl {url}/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'",
        f"console: {site}/console, or: segue top",
        *_cautions(settings),
        f"logs in {cluster.logs}",
        "Ctrl-C stops",
    )
    console.print("\n" + "\n".join(lines), markup=False)


def _cautions(settings: ClusterSettings) -> list[str]:
    """What whoever opens a cluster to a network should know."""
    if settings.api_keys_file is not None:
        return [f"API keys: segue keys create NAME --file {settings.api_keys_file}"]
    if settings.host in LOOPBACK_NAMES:
        return []
    return [f"without API keys everybody who reaches {settings.host} is let in; see segue keys --help"]
