"""The router's certificate on both APIs, read again when it is replaced: connections made from then on get the new one.

Changed client authorities (tls_client_ca) need a new start: what Python's TLS has once taken for true it never forgets.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from router.file_watch import follow, stamp_of
from segue.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM. `client_ca` is there for mutual TLS alone."""

    cert: Path
    key: Path
    client_ca: Path | None = None


class ServerTls:
    """Raises ConfigError, when made, that names the setting whose file is no good."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._stamp = stamp_of([files.cert, files.key])
        self._client_ca = None if files.client_ca is None else _read(files.client_ca, "tls_client_ca")
        self.http = self._context()
        self._fresh: grpc.ServerCertificateConfiguration | None = None
        self.grpc = grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            self._take_fresh,  # type: ignore[arg-type]  # the types do not know that None means no change
            require_client_authentication=self._client_ca is not None,
        )

    async def follow(self) -> None:
        """Until cancelled."""
        await follow([self._files.cert, self._files.key], self._reload, self._stamp)

    def _reload(self) -> None:
        # A pair that does not fit must not spoil the one in use.
        self._context()
        self._fresh = self._configuration()
        self.http.load_cert_chain(self._files.cert, self._files.key)

    def _take_fresh(self) -> grpc.ServerCertificateConfiguration | None:
        """gRPC asks at each handshake, on a thread of its own. None: nothing new."""
        fresh, self._fresh = self._fresh, None
        return fresh

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        pair = (_read(self._files.key, "tls_key"), _read(self._files.cert, "tls_cert"))
        return grpc.ssl_server_certificate_configuration([pair], self._client_ca)

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._files.cert, self._files.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"tls_cert, tls_key: {self._files.cert} and {self._files.key} are no certificate and its key in PEM: {error}",
                field="tls_cert",
            ) from None
        if self._client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(cadata=self._client_ca.decode(errors="replace"))
            except ssl.SSLError as error:
                message = f"tls_client_ca: {self._files.client_ca} has no certificates in PEM: {error}"
                raise ConfigError(message, field="tls_client_ca") from None
        return context


def _read(file: Path, setting: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: cannot read {file}: {error.strerror}", field=setting) from None
