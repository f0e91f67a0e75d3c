"""How a client reaches a cluster that has TLS or API keys.

    127.0.0.1:50051           plain
    grpcs://host:50051        TLS; the cluster's certificate must be signed by an authority that this machine trusts, or `ca`

What is not given comes from the environment: SEGUE_API_KEY, SEGUE_CA, SEGUE_CLIENT_CERT, SEGUE_CLIENT_KEY.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import grpc

from segue.errors import ConfigError

_TLS, _PLAIN = "grpcs://", "grpc://"


@dataclass(frozen=True, slots=True)
class Access:
    """`ca`: authorities (PEM) to trust instead of this machine's; given, the connection is TLS. `cert` and `key` (PEM) are what
    a cluster with mutual TLS asks for."""

    api_key: str | None = field(default=None, repr=False)
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Self:
        """`env` is os.environ unless given; what is empty there counts as not given."""
        source = os.environ if env is None else env

        def path(name: str) -> Path | None:
            return Path(source[name]) if source.get(name) else None

        return cls(source.get("SEGUE_API_KEY") or None, path("SEGUE_CA"), path("SEGUE_CLIENT_CERT"), path("SEGUE_CLIENT_KEY"))

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ConfigError("SEGUE_CLIENT_CERT, SEGUE_CLIENT_KEY: give both or none")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ConfigError("SEGUE_API_KEY: has characters that no API key has; was it copied whole?")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def credentials(self, address: str) -> grpc.ChannelCredentials | None:
        """None for a plain connection. Raises ConfigError for files that cannot be read."""
        if not address.startswith(_TLS) and self.ca is None:
            return None
        ca, cert, key = (None if file is None else _read(file) for file in (self.ca, self.cert, self.key))
        return grpc.ssl_channel_credentials(ca, key, cert)


def target(address: str) -> str:
    """host:port of an address, whichever way it is reached."""
    return address.removeprefix(_TLS).removeprefix(_PLAIN)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
