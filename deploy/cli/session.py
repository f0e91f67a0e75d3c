"""What the client commands share: the address option, and a client whose errors end the command in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from deploy.cli.console import errors_reported
from segue.client import Client
from segue.client.channel import DEFAULT_ADDRESS
from segue.errors import Unreachable

AddressOption = Annotated[
    str,
    typer.Option(
        "--address",
        "-a",
        envvar="SEGUE_ADDRESS",
        help="Where the cluster's gRPC API answers: host:port, with TLS grpcs://host:port. An API key comes from "
        "SEGUE_API_KEY, certificates from SEGUE_CA, SEGUE_CLIENT_CERT and SEGUE_CLIENT_KEY (files).",
    ),
]


@contextmanager
def connected(address: str) -> Iterator[Client]:
    with errors_reported(), told_how_to_start(address), Client(address) as client:
        yield client


@contextmanager
def told_how_to_start(address: str) -> Iterator[None]:
    """Replaces gRPC's account of a refused connection by what to do about it."""
    try:
        yield
    except Unreachable:
        raise unreachable(address) from None


def unreachable(address: str) -> Unreachable:
    is_default = address == DEFAULT_ADDRESS
    advice = "start one with: segue up" if is_default else "check --address, or start one with: segue up"
    return Unreachable(f"no Segue cluster answers at {address}; {advice}")
