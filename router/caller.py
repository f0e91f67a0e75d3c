"""On whose behalf a request is served."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """`tenant` shares the cluster's work with others, by `weight`; `cache_salt` separates its prefix caches from theirs. Of
    requests that wait a lower `priority` is served first."""

    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    cache_salt: bytes = b""


ANONYMOUS = Caller()
