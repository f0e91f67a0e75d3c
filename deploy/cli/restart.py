"""`segue restart`: workers start anew, one after the other, under load."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.cli.console import progress_shown
from deploy.cli.session import AddressOption, connected
from deploy.cli.worker_commands import ForceOption, GraceOption, seconds, wait_until, what_is_left
from segue.client import Client, WorkerStatus
from segue.client.channel import DEFAULT_ADDRESS
from segue.errors import ConfigError


def restart(
    workers: Annotated[list[str] | None, typer.Argument(help="Names, as segue status shows them.", show_default=False)] = None,
    rolling: Annotated[bool, typer.Option("--rolling", help="All workers of the cluster.")] = False,
    grace: GraceOption = "60s",
    ready_within: Annotated[
        str, typer.Option("--ready-within", metavar="TIME", help="How long one may take from being drained to serving again.")
    ] = "10m",
    force: ForceOption = False,
    address: AddressOption = DEFAULT_ADDRESS,
) -> None:
    """Start workers anew without a failed request: to take up new code, or to be rid of a bad state.

    Each is drained, ends, is started again by what keeps it (segue up, Kubernetes) and must serve before the next one's turn.
    The first that does not come back ends the command, and the others are left as they are.
    """
    with connected(address) as client:
        grace_s, limit_s = seconds(grace, "--grace"), seconds(ready_within, "--ready-within")
        known = {worker.worker_id: worker for worker in client.status().workers}
        names = sorted(known) if rolling else workers or []
        if not names:
            raise ConfigError("name the workers to restart, or give --rolling for all of them")
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(f"there is no worker {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
        for place, name in enumerate(names, start=1):
            _restart(client, known[name], grace_s, limit_s, force=force, turn=f"[{place}/{len(names)}]")


def _restart(client: Client, worker: WorkerStatus, grace_s: float, limit_s: float, *, force: bool, turn: str) -> None:
    name = worker.worker_id
    client.restart_worker(name, grace_s=grace_s, force=force)
    with progress_shown() as progress:

        def show(now: WorkerStatus | None) -> None:
            if now is None or now.state == "lost":
                progress(f"{turn} {name}: starting", 0.0)
            elif now.epoch == worker.epoch:
                progress(f"{turn} {name}: {what_is_left(now)}", 0.0)

        def serves_again(now: WorkerStatus | None) -> bool:
            return now is not None and now.epoch > worker.epoch and now.state == "ready"

        wait_until(client, name, serves_again, grace_s + limit_s, show)
    typer.echo(f"{turn} {name} serves again")
