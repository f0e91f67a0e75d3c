"""`segue scale`: workers are added or taken away while the cluster serves."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from deploy.cli.console import progress_shown
from deploy.cli.session import AddressOption, connected
from deploy.cli.worker_commands import seconds
from segue.client import Client
from segue.client.channel import DEFAULT_ADDRESS
from segue.client.status import ScaleStatus
from segue.errors import ConfigError, DeadlineExceeded, SegueError

_BETWEEN_LOOKS_S = 0.3


def scale(
    sizes: Annotated[
        list[str] | None, typer.Argument(metavar="prefill=N decode=N", help="One or both.", show_default=False)
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until all serve, and those too many are gone.")] = True,
    within: Annotated[str, typer.Option("--within", metavar="TIME", help="How long to wait at most.")] = "10m",
    address: AddressOption = DEFAULT_ADDRESS,
) -> None:
    """Change the number of prefill and decode workers of a cluster that segue up keeps, without a failed request.

    Missing ones are started; those too many take nothing new, finish what they have and leave, the highest number first. What
    was asked for holds until the next segue scale, also when the same cluster is started again. On Kubernetes use kubectl
    scale. Without numbers: waits for what was asked for last.
    """
    asked = parse_sizes(sizes or [])
    limit_s = seconds(within, "--within")
    with connected(address) as client:
        status = client.scale_workers(**asked)
        if wait:
            status = _wait(client, limit_s)
            typer.echo(f"{status.prefill} prefill and {status.decode} decode workers serve")
        else:
            typer.echo(
                f"asked for {status.prefill} prefill and {status.decode} decode workers; segue scale shows how far it is"
            )


def parse_sizes(words: Sequence[str]) -> dict[str, int]:
    """`prefill=3`, `decode=5`. Raises ConfigError."""
    sizes: dict[str, int] = {}
    for word in words:
        match = re.fullmatch(r"(prefill|decode)=([0-9]{1,4})", word)
        if match is None:
            raise ConfigError(f"{word!r} is no number of workers; write prefill=3 decode=5, or one of the two")
        if match[1] in sizes:
            raise ConfigError(f"{match[1]} is given twice", field=match[1])
        sizes[match[1]] = int(match[2])
    return sizes


def _wait(client: Client, limit_s: float) -> ScaleStatus:
    """Until all is as it was asked for. A router that does not answer for a moment is asked again."""
    deadline_s = time.monotonic() + limit_s
    state = "nothing is known yet"
    with progress_shown() as progress:
        while time.monotonic() < deadline_s:
            try:
                status = client.scale_workers()
            except SegueError as error:
                if not error.retryable:
                    raise
            else:
                if status.done:
                    return status
                state = describe(status)
                progress(state, 0.0)
            time.sleep(_BETWEEN_LOOKS_S)
    raise DeadlineExceeded(f"not done after {limit_s:g} s: {state}. What was asked for holds, and is followed when it can be")


def describe(status: ScaleStatus) -> str:
    """In one line."""
    parts = [f"to {status.prefill} prefill and {status.decode} decode workers"]
    parts += [f"starting {', '.join(status.starting)}"] if status.starting else []
    parts += [f"finishing {', '.join(status.leaving)}"] if status.leaving else []
    return "; ".join([*parts, status.problem] if status.problem else parts)
