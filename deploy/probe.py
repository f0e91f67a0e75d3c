"""Asks a router over HTTP whether it is there, and whether it can serve."""

from __future__ import annotations

import asyncio
import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from deploy.waiting import in_daemon_thread
from segue.client import Access
from segue.config import DoorSettings
from segue.errors import ConfigError

_PROBE_S = 30.0
_BETWEEN_PROBES_S = 0.2


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer; `status` 0 when there was none, and `body` then says why."""

    status: int
    body: str

    @property
    def is_ok(self) -> bool:
        return self.status == 200

    def fields(self) -> dict[str, Any]:
        """The body as a JSON object; empty if it is none."""
        try:
            value = json.loads(self.body)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}


def ask(address: str, path: str, timeout_s: float = _PROBE_S, tls: ssl.SSLContext | None = None) -> Answer:
    """GET http://`address``path`, or https:// where `tls` is given, past any proxy that the environment names."""
    scheme = "http" if tls is None else "https"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls))
    try:
        with opener.open(f"{scheme}://{address}{path}", timeout=timeout_s) as response:
            return Answer(response.status, response.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode(errors="replace"))
    except OSError as error:
        return Answer(0, str(error.reason if isinstance(error, urllib.error.URLError) else error))


def own_tls(settings: DoorSettings, access: Access) -> ssl.SSLContext | None:
    """To reach this machine's own router: trusts its very certificate, whichever names that has. Raises ConfigError."""
    if settings.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(settings.tls_cert)
        if access.cert is not None:
            context.load_cert_chain(access.cert, access.key)
    except OSError as error:  # which SSLError is too
        raise ConfigError(f"tls_cert: cannot use {settings.tls_cert}: {error}", field="tls_cert") from None
    return context


def own_grpc(address: str, settings: DoorSettings) -> str:
    """The address as a client takes it."""
    return address if settings.tls_cert is None else f"grpcs://{address}"


async def until_ready(address: str, tls: ssl.SSLContext | None = None) -> None:
    """Returns once /ready says 200. It has no other end: the caller bounds it. (/ready cannot be awaited, only asked.)"""
    while True:
        if (await in_daemon_thread(lambda: ask(address, "/ready", tls=tls))).is_ok:
            return
        await asyncio.sleep(_BETWEEN_PROBES_S)
