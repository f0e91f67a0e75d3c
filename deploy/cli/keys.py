"""`segue keys`: make, list and revoke the API keys of a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from deploy.cli.console import errors_reported, new_console
from segue.api_keys import DEFAULT_FILE, PERMISSIONS, create_key, read_keys, revoke_key

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys. Routers take changes over within a second.")

FileOption = Annotated[
    Path,
    typer.Option(
        "--file", "-f", envvar="SEGUE_API_KEYS_FILE", help="The file that segue up --api-keys was, or will be, given."
    ),
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is; one key for each name.")],
    tenant: Annotated[
        str | None, typer.Option(help="Whom it counts for; keys of one tenant share caches. The name, if not given.")
    ] = None,
    permission: Annotated[
        list[str] | None,
        typer.Option(help=f"What for: {', '.join(PERMISSIONS)}; may be given several times. infer, if not given."),
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="At most this many requests.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="At most this many tokens, prompts and answers.")] = None,
    weight: Annotated[float, typer.Option(help="Share of a busy cluster, beside the weights of other tenants.")] = 1.0,
    best_priority: Annotated[int, typer.Option(help="The lowest, most urgent priority number that requests get.")] = 0,
    file: FileOption = DEFAULT_FILE,
) -> None:
    """Make a key and print it, once: only its hash is kept.

    The key goes to standard output, so that it can be piped to where it is needed.
    """
    with errors_reported():
        key = create_key(
            file,
            name,
            tenant,
            permissions=tuple(permission or ("infer",)),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            weight=weight,
            best_priority=best_priority,
        )
        typer.echo(key)
        notes = new_console(stderr=True)
        notes.print("this is the only time that it is shown; clients take it from SEGUE_API_KEY", style="dim", markup=False)
        notes.print(f"a cluster asks for keys when it is started with: segue up --api-keys {file}", style="dim", markup=False)


@app.command("list")
def list_(file: FileOption = DEFAULT_FILE) -> None:
    """List keys: whose they are and what for, never the keys themselves."""
    with errors_reported():
        table = Table("name", "tenant", "id", "for", "requests/min", "tokens/min", "weight", "priority", "made", box=None)
        for key in read_keys(file):
            limits = [str(number or "") for number in (key.requests_per_minute, key.tokens_per_minute)]
            permissions = ", ".join(key.permissions)
            table.add_row(
                key.name, key.tenant, key.key_id, permissions, *limits, f"{key.weight:g}", str(key.best_priority), key.created
            )
        new_console().print(table)


@app.command()
def revoke(name: Annotated[str, typer.Argument(help="As segue keys list shows it.")], file: FileOption = DEFAULT_FILE) -> None:
    """Take a key away. New requests with it are refused within a second; those under way may finish."""
    with errors_reported():
        revoke_key(file, name)
        new_console().print(f"{name} is revoked in {file}", markup=False)
