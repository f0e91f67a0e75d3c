"""What the commands for single workers share: arguments, durations, and waiting with progress."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Annotated

import typer

from segue.client import Client, WorkerStatus
from segue.errors import ConfigError, DeadlineExceeded, SegueError

WorkerArgument = Annotated[str, typer.Argument(help="Its name, as segue status shows it.", show_default=False)]
GraceOption = Annotated[
    str, typer.Option("--grace", metavar="TIME", help="What still runs after so long goes on on other workers.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Also when requests will fail: no other ready worker has its role.")]

_UNITS_S = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BETWEEN_LOOKS_S = 0.2


def seconds(text: str, option: str) -> float:
    """`90`, `500ms`, `10m`, `1h`. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|[smhd]?)", text.strip().lower())
    if match is None:
        raise ConfigError(f"{option}: {text!r} is no time; write 30s, 10m or 1h", field=option)
    return float(match[1]) * _UNITS_S[match[2]]


def wait_until(
    client: Client,
    worker_id: str,
    holds: Callable[[WorkerStatus | None], bool],
    limit_s: float,
    show: Callable[[WorkerStatus | None], None],
) -> None:
    """Asks for the worker's status (None: it is not there) until it `holds`, and shows each. A router that does not answer for
    a moment is asked again. Raises DeadlineExceeded."""
    deadline_s = time.monotonic() + limit_s
    while True:
        try:
            status = next((worker for worker in client.status().workers if worker.worker_id == worker_id), None)
        except SegueError as error:
            if not error.retryable:
                raise
        else:
            if holds(status):
                return
            show(status)
        if time.monotonic() > deadline_s:
            raise DeadlineExceeded(f"{worker_id} is not done after {limit_s:g} s; segue status shows it, its log may say why")
        time.sleep(_BETWEEN_LOOKS_S)


def what_is_left(worker: WorkerStatus) -> str:
    load = worker.load
    return (
        f"{load.running_requests} running, {load.waiting_requests} waiting, {load.open_tickets} tickets, "
        f"{load.leased_blocks} blocks held"
    )
