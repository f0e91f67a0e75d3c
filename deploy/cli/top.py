"""`segue top`: the console in a terminal: workers, KV on its way, how long tokens take, the newest requests."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from deploy.cli.explain import STAGE_COLOURS
from deploy.cli.session import AddressOption, connected, unreachable
from deploy.cli.status import is_wide, render, table_console
from router.waterfall import Span, spans_of
from segue.client import Client
from segue.client.channel import DEFAULT_ADDRESS
from segue.client.status import TransferRate, status_from_pb
from segue.errors import PermissionDenied, SegueError, Unauthenticated, Unreachable
from segue.v1.operator_pb2 import GetOverviewResponse, Latency, RequestRecord

_QUIT_KEYS = (b"q", b"Q")
_NUM_REQUESTS = 50
# Piped on, where no height cuts it.
_NUM_REQUESTS_PIPED = 10
_LEVELS = "▁▂▃▄▅▆▇█"
_SPARKLINE_WIDTH = 60
_FLOW_WIDTH, _MAX_FLOWS = 20, 8
_BAR_WIDTH, _NARROW_BAR_WIDTH = 40, 14
_OUTCOME_STYLES = {"running": "cyan", "ok": "green", "cancelled": "dim"}
# Lines between the table of workers and that of requests, and the borders of both.
_OTHER_LINES = 8


def top(
    once: Annotated[bool, typer.Option("--once", help="Print what there is now, and leave.")] = False,
    interval_s: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks.")] = 1.0,
    address: AddressOption = DEFAULT_ADDRESS,
) -> None:
    """Watch a cluster: workers, KV on its way between them, TTFT and token gaps, the newest requests and their waterfalls.

    q or Ctrl-C leaves. Requests and latencies (of the latest five minutes) are those of the router that is asked. Where routers
    have API keys, it takes one with the permission observe or operate. In a browser: http://ROUTER:8000/console.
    """
    with connected(address) as client:
        first = client.overview(_NUM_REQUESTS)
        console = table_console()
        if once or not console.is_terminal or not sys.stdin.isatty():
            console.print(frame(first, console.width, _NUM_REQUESTS_PIPED))
            return
        _watch(client, first, interval_s, console)


def _watch(client: Client, first: GetOverviewResponse, interval_s: float, console: Console) -> None:
    """A cluster that goes away is said to be away, and shown again when it is back."""
    with suppress(KeyboardInterrupt), _keys_read_singly(), Live(console=console, screen=True, auto_refresh=False) as live:
        shown: RenderableType = _fitting(first, console)
        while True:
            live.update(shown, refresh=True)
            if _told_to_quit(interval_s):
                return
            try:
                shown = _fitting(client.overview(_NUM_REQUESTS), console)
            except Unreachable:
                shown = Text(unreachable(client.address).message, style="red")
            except (Unauthenticated, PermissionDenied):
                raise
            except SegueError as error:
                shown = Text(error.message, style="red")


@contextmanager
def _keys_read_singly() -> Iterator[None]:
    """A key counts without Enter, and is not shown. However the block ends, the terminal is as it was."""
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _told_to_quit(within_s: float) -> bool:
    """By a key, or because the terminal is gone. Returns before the time is over when any key is pressed."""
    if not select.select([sys.stdin], [], [], within_s)[0]:
        return False
    return os.read(sys.stdin.fileno(), 1) in (*_QUIT_KEYS, b"")


def _fitting(overview: GetOverviewResponse, console: Console) -> RenderableType:
    num_lines = len(overview.cluster.workers) + min(len(overview.cluster.transfers), _MAX_FLOWS) + _OTHER_LINES
    return frame(overview, console.width, max(console.height - num_lines, 1))


def frame(overview: GetOverviewResponse, width: int, num_requests: int) -> RenderableType:
    """All of it, with the newest `num_requests` requests."""
    cluster = status_from_pb(overview.cluster)
    wide = is_wide(width)
    requests = list(overview.requests)[:num_requests]
    return Group(
        render(cluster, wide=wide),
        Text(""),
        *_flows(cluster.transfers),
        _latency("TTFT", overview.ttft, width),
        _latency("token gap", overview.inter_token, width),
        Text(""),
        _requests(requests, wide=wide) if requests else Text("this router has served no request yet", style="dim"),
    )


def _flows(transfers: tuple[TransferRate, ...]) -> Iterator[Text]:
    """The broadest first."""
    broadest = sorted(transfers, key=lambda transfer: -transfer.bytes_per_s)[:_MAX_FLOWS]
    for transfer in broadest:
        line = "━" * max(round(transfer.bytes_per_s / broadest[0].bytes_per_s * _FLOW_WIDTH), 1) + "▶"
        way = f"{transfer.prefill_worker} {line.ljust(_FLOW_WIDTH + 1)} {transfer.decode_worker}"
        yield Text.assemble("KV  ", (way, "cyan"), f"  {transfer.bytes_per_s / 2**20:,.2f} MiB/s")


def _latency(name: str, latency: Latency, width: int) -> Text:
    title = name.ljust(10)
    if not latency.count:
        return Text(f"{title}nothing measured in the latest five minutes", style="dim")
    facts = f"p50 {milliseconds(latency.p50_s)}  p99 {milliseconds(latency.p99_s)}".ljust(34)
    room = max(min(width - len(title) - len(facts), _SPARKLINE_WIDTH), 0)
    return Text.assemble(title, facts, (sparkline(latency)[-room:] if room else "", "cyan"))


def sparkline(latency: Latency) -> str:
    """The p99 of each stretch of the latest five minutes, the newest last; a blank where nothing was measured."""
    longest_s = max((point.p99_s for point in latency.points), default=0.0)
    cells = [" "] * _SPARKLINE_WIDTH
    for point in latency.points:
        place = _SPARKLINE_WIDTH - 1 - int(point.age_s / latency.point_s)
        if place >= 0:
            cells[place] = _LEVELS[round(point.p99_s / longest_s * (len(_LEVELS) - 1))]
    return "".join(cells)


def _requests(records: list[RequestRecord], *, wide: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("request", no_wrap=True)
    table.add_column("at", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    for name in ("prompt", "output", "TTFT"):
        table.add_column(name, justify="right", no_wrap=True)
    if wide:
        table.add_column("way", no_wrap=True)
    table.add_column("where its time went", no_wrap=True)
    for record in records:
        table.add_row(*_cells(record, wide=wide))
    return table


def _cells(record: RequestRecord, *, wide: bool) -> Iterator[Text]:
    path = record.paths[0] if record.paths else None
    yield Text(record.request_id.removeprefix("req_")[:8])
    yield Text(time.strftime("%H:%M:%S", time.localtime(record.arrived_unix_s)))
    yield Text(record.outcome, style=_OUTCOME_STYLES.get(record.outcome, "red"))
    yield Text(str(record.num_prompt_tokens))
    yield Text(str(record.num_output_tokens))
    yield Text(milliseconds(path.ttft_s) if path is not None and path.ttft_s else "")
    if wide:
        yield Text("" if path is None else " → ".join(filter(None, (path.prefill_worker, path.decode_worker))))
    yield Text("") if path is None else strip(list(spans_of(path)), _BAR_WIDTH if wide else _NARROW_BAR_WIDTH)


def strip(spans: list[Span], width: int) -> Text:
    """A waterfall in one line: at each moment the stretch that began last, which is what was waited for."""
    end_s = max((span.end_s for span in spans), default=0.0)
    bar = Text()
    for column in range(width if end_s else 0):
        moment_s = (column + 0.5) / width * end_s
        running = [span for span in spans if span.start_s <= moment_s < span.end_s]
        name = max(running, key=lambda span: span.start_s).name.split()[-1] if running else ""
        bar.append("█" if name else " ", STAGE_COLOURS.get(name, ""))
    return bar


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"
