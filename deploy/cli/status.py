"""`segue status`: who is in the cluster and how busy they are."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.cli.session import AddressOption, connected, unreachable
from segue.client import Client, ClusterStatus, WorkerLoad, WorkerStatus
from segue.client.channel import DEFAULT_ADDRESS
from segue.errors import SegueError, Unreachable

_STATE_STYLES = {"ready": "green", "draining": "yellow", "drained": "yellow", "lost": "red"}
# Characters.
_WIDE_BAR, _NARROW_BAR = 12, 8
_WIDE_TERMINAL = 110
_PIPED_WIDTH = 200


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, one line for each look.")] = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look again and again, until Ctrl-C.")] = False,
    interval_s: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks.")] = 1.0,
    address: AddressOption = DEFAULT_ADDRESS,
) -> None:
    """Show the cluster's workers: roles, state, load and KV cache.

    Requests run or wait; `queued` counts prompt tokens not yet computed. The bar shows KV blocks: █ held by requests,
    ▒ cached prefixes that may be reclaimed, · free.
    """
    with connected(address) as client:
        first = client.status()
        if as_json:
            _print_json(client, first, watch=watch, interval_s=interval_s)
        elif watch:
            _watch(client, first, interval_s)
        else:
            console = table_console()
            console.print(render(first, wide=is_wide(console.width)))


def table_console() -> Console:
    console = Console(highlight=False)
    # No terminal, no width: a table that is piped on keeps one line for each worker.
    return console if console.is_terminal else Console(highlight=False, width=_PIPED_WIDTH)


def is_wide(width: int) -> bool:
    return width >= _WIDE_TERMINAL


def _print_json(client: Client, first: ClusterStatus, *, watch: bool, interval_s: float) -> None:
    typer.echo(json.dumps(asdict(first)))
    with suppress(KeyboardInterrupt):
        while watch:
            time.sleep(interval_s)
            typer.echo(json.dumps(asdict(client.status())))


def _watch(client: Client, first: ClusterStatus, interval_s: float) -> None:
    """A cluster that goes away is said to be away, and shown again when it is back."""
    console = table_console()
    shown = render(first, wide=is_wide(console.width))
    with suppress(KeyboardInterrupt), Live(shown, console=console, auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            live.update(_look(client, wide=is_wide(console.width)), refresh=True)


def _look(client: Client, *, wide: bool) -> RenderableType:
    try:
        return render(client.status(), wide=wide)
    except Unreachable:
        return Text(unreachable(client.address).message, style="red")
    except SegueError as error:
        return Text(error.message, style="red")


def render(cluster: ClusterStatus, *, wide: bool) -> RenderableType:
    """A title line, a table of workers, and a line for each thing that is wrong. What 80 columns cannot hold is left out unless
    `wide`."""
    title = f"{cluster.model} · Segue {cluster.version} · {cluster.active_requests} active requests"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("worker", "roles", "state"):
        table.add_column(name)
    for name in ("run", "wait", "queued"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("KV blocks", "pid", *(("epoch", "address") if wide else ())):
        table.add_column(name, no_wrap=True)
    for worker in cluster.workers:
        table.add_row(*_cells(worker, wide=wide))
    problems = [Text(problem, style="red") for problem in _problems(cluster)]
    return Group(Text(title), table, *problems)


def _cells(worker: WorkerStatus, *, wide: bool) -> tuple[RenderableType, ...]:
    load = worker.load
    bar = blocks_bar(load, _WIDE_BAR if wide else _NARROW_BAR)
    return (
        Text(worker.worker_id),
        Text("+".join(worker.roles)),
        Text(worker.state, style=_STATE_STYLES.get(worker.state, "")),
        Text(str(load.running_requests)),
        Text(str(load.waiting_requests)),
        Text(str(load.queued_tokens)),
        Text(f"{bar} {load.leased_blocks + load.cached_blocks}/{load.total_blocks}"),
        Text(str(worker.pid)),
        *((Text(str(worker.epoch)), Text(worker.address)) if wide else ()),
    )


def blocks_bar(load: WorkerLoad, width: int) -> str:
    """Leased, cached and free blocks as a bar; whatever there is of a kind shows as one character at least."""
    if not load.total_blocks:
        return " " * width
    leased = _share(load.leased_blocks, load.total_blocks, width)
    cached = min(_share(load.cached_blocks, load.total_blocks, width), width - leased)
    return "█" * leased + "▒" * cached + "·" * (width - leased - cached)


def _share(part: int, whole: int, width: int) -> int:
    return max(round(part / whole * width), 1 if part else 0)


def _problems(cluster: ClusterStatus) -> list[str]:
    problems = []
    if cluster.missing_roles:
        problems.append(f"cannot serve: no ready worker for {' and '.join(cluster.missing_roles)}")
    if not cluster.membership_fresh:
        problems.append("the membership store cannot be reached; this is the last list of workers known")
    return problems
