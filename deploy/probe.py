"""Asks a router over HTTP whether it is there, and whether it can serve."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from deploy.waiting import in_daemon_thread

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


def ask(address: str, path: str, timeout_s: float = _PROBE_S) -> Answer:
    """GET http://`address``path`, past any proxy that the environment names."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}{path}", timeout=timeout_s) as response:
            return Answer(response.status, response.read().decode(errors="replace"))
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode(errors="replace"))
    except OSError as error:
        return Answer(0, str(error.reason if isinstance(error, urllib.error.URLError) else error))


async def until_ready(address: str) -> None:
    """Returns once /ready says 200. It has no other end: the caller bounds it. (/ready cannot be awaited, only asked.)"""
    while True:
        if (await in_daemon_thread(lambda: ask(address, "/ready"))).is_ok:
            return
        await asyncio.sleep(_BETWEEN_PROBES_S)
