"""What the launcher says while it starts a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

StageName = Literal["store", "model", "ray", "workers", "router", "ready"]


@dataclass(frozen=True, slots=True)
class Stage:
    """`share` is how much of it is done, from 0 to 1, where that is known."""

    name: StageName
    state: Literal["running", "done"]
    detail: str
    share: float | None = None


Report = Callable[[Stage], None]


def silent(_stage: Stage) -> None:
    """For those who do not watch."""
