"""On whose behalf a request is served."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """What an API key allows. None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    # The lowest number, which is the most urgent, that a request gets, whatever it asks for.
    best_priority: int | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """`tenant` shares the cluster's work with others, by `weight`; `cache_salt` separates its prefix caches from theirs. Of
    requests that wait a lower `priority` is served first. `key_id` names the API key that the call came with, of which the
    limits are."""

    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    cache_salt: bytes = b""
    key_id: str = ""
    limits: CallerLimits = CallerLimits()

    def asking(self, priority: int) -> Caller:
        """The same with a request's priority, as far as its key allows."""
        best = self.limits.best_priority
        return replace(self, priority=priority if best is None else max(priority, best))


ANONYMOUS = Caller()

# Of the call that the running task answers; set where calls come in.
CURRENT_CALLER: ContextVar[Caller] = ContextVar("current_caller", default=ANONYMOUS)
