"""`segue drain`: a worker finishes what it has and takes nothing new."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.cli.console import progress_shown
from deploy.cli.session import AddressOption, connected
from deploy.cli.worker_commands import ForceOption, GraceOption, WorkerArgument, seconds, wait_until, what_is_left
from segue.client import WorkerStatus
from segue.client.channel import DEFAULT_ADDRESS

# After the grace what is left is given up, which takes as long as a step.
_MARGIN_S = 60.0


def drain(
    worker: WorkerArgument,
    grace: GraceOption = "60s",
    undo: Annotated[bool, typer.Option("--undo", help="Let the worker take requests again.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it holds nothing any more.")] = True,
    force: ForceOption = False,
    address: AddressOption = DEFAULT_ADDRESS,
) -> None:
    """Take a worker out of service without a failed request, for maintenance.

    It takes nothing new from now on, finishes what it has and waits for its hand-overs. What still runs after --grace
    continues on other workers, unseen by its clients. The worker then stays, without work, until --undo, segue restart or its
    end.
    """
    with connected(address) as client:
        grace_s = seconds(grace, "--grace")
        client.drain_worker(worker, grace_s=grace_s, undo=undo, force=force)
        if undo:
            typer.echo(f"{worker} takes requests again")
            return
        if not wait:
            typer.echo(f"{worker} is draining; segue status shows when it is drained")
            return
        with progress_shown() as progress:

            def show(status: WorkerStatus | None) -> None:
                if status is not None:
                    progress(f"{worker}: {what_is_left(status)}", 0.0)

            wait_until(client, worker, lambda now: now is None or now.state in {"drained", "lost"}, grace_s + _MARGIN_S, show)
        typer.echo(f"{worker} is drained and holds nothing; take it back with: segue drain {worker} --undo")
