"""The commands of `segue`. They import what is heavy or not always installed (torch, ray, redis) where it is used."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from deploy.cli.chat import chat
from deploy.cli.doctor import doctor
from deploy.cli.drain import drain
from deploy.cli.explain import explain
from deploy.cli.generate import generate
from deploy.cli.keys import app as keys_app
from deploy.cli.models import app as models_app
from deploy.cli.process import router, worker
from deploy.cli.restart import restart
from deploy.cli.role import role
from deploy.cli.scale import scale
from deploy.cli.status import status
from deploy.cli.top import top
from deploy.cli.up import up

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Segue: an LLM inference cluster that splits prefill from decode.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"segue {version('segue')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(up)
app.command()(generate)
app.command()(chat)
app.command()(status)
app.command()(top)
app.command()(explain)
app.command()(drain)
app.command()(restart)
app.command()(role)
app.command()(scale)
app.command()(doctor)
app.command()(router)
app.command()(worker)
app.add_typer(models_app, name="models")
app.add_typer(keys_app, name="keys")
