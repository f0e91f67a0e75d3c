"""On whose behalf a request is served."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """What an API key allows. None: no limit. `weight` is the tenant's share of a busy cluster, beside the others'."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    weight: float = 1.0
    # The highest that a request may ask for.
    max_priority: int | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """`tenant` shares the cluster's work with others, fairly; `cache_salt` separates its prefix caches from theirs. `key_id`
    names the API key that the call came with, which the limits are those of."""

    tenant: str = ""
    priority: int = 0
    cache_salt: bytes = b""
    key_id: str = ""
    limits: CallerLimits = CallerLimits()


ANONYMOUS = Caller()

# Of the call that the running task answers; set where calls come in.
CURRENT_CALLER: ContextVar[Caller] = ContextVar("current_caller", default=ANONYMOUS)
