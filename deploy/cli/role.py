"""`segue role`: a worker changes sides while it serves."""

from __future__ import annotations

from typing import Annotated

import typer

from deploy.cli.session import AddressOption, connected
from deploy.cli.worker_commands import ForceOption, WorkerArgument, seconds
from segue.client.channel import DEFAULT_ADDRESS


def role(
    worker: WorkerArgument,
    role: Annotated[str, typer.Argument(metavar="prefill|decode", help="What it shall do from now on.", show_default=False)],
    lease: Annotated[
        str, typer.Option("--for", metavar="TIME", help="Afterwards it has its own role again; asking again renews.")
    ] = "1h",
    force: ForceOption = False,
    address: AddressOption = DEFAULT_ADDRESS,
) -> None:
    """Flip a worker to the other role, at once and without a failed request.

    What it has goes on to its end; new requests come by the new role. A role is a lease: after --for, or when the worker starts
    anew, it has the role again that it was started with. Asking for that role ends the lease. A worker whose weights, KV format
    or number of ranks are those of its role alone cannot be flipped.
    """
    with connected(address) as client:
        status = client.set_worker_role(worker, role, lease_s=seconds(lease, "--for"), force=force)
        until = f" for {lease}" if status.roles_until_unix_s else ", its own role"
        typer.echo(f"{worker} is a {' and '.join(status.roles)} worker now{until}")
