"""`segue doctor`: is this machine fit to run a cluster, and is the cluster that runs here well?"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Annotated

import typer

from deploy.cli.console import errors_reported, new_console
from segue.config import LOOPBACK, ClusterSettings

_STYLES = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    host: Annotated[
        str | None, typer.Option(help=f"Where the router listens. (default {LOOPBACK})", show_default=False)
    ] = None,
    http_port: Annotated[int | None, typer.Option(help="Its HTTP port. (default 8000)", show_default=False)] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Its gRPC port. (default 50051)", show_default=False)] = None,
) -> None:
    """Check this machine, and the cluster if one runs: a line for each check, and what to do about it.

    The exit code is 1 if a check failed; warnings leave it 0.
    """
    with errors_reported():
        settings = ClusterSettings.load(flags={"host": host, "http_port": http_port, "grpc_port": grpc_port})
        from deploy.doctor import Finding, examine

        console = new_console()

        def show(finding: Finding) -> None:
            if not as_json:
                console.print(f"{finding.verdict:5}", style=_STYLES[finding.verdict], end="")
                advice = f" → {finding.advice}" if finding.advice else ""
                console.print(f"{finding.check:10}{finding.detail}{advice}", markup=False)

        findings = asyncio.run(examine(settings, show))
        is_fit = all(finding.verdict != "fail" for finding in findings)
        if as_json:
            typer.echo(json.dumps({"ok": is_fit, "checks": [asdict(finding) for finding in findings]}, indent=2))
        raise typer.Exit(0 if is_fit else 1)
