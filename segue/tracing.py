"""One trace for each request, over router and workers: W3C trace context, and spans made when what they tell of is over.

Nothing here loads OpenTelemetry; segue.otel does, where a collector is given. A request that nobody traces costs nothing.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from segue.errors import SegueError

# https://www.w3.org/TR/trace-context. Later versions begin like version 00, and may go on.
_LENGTHS = (32, 16, 2)
_SAMPLED = 1


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span, as others refer to it. Ids are in lowercase hex, of 16 and 8 bytes. `parent_id` is of the span above it, if
    that is known."""

    trace_id: str
    span_id: str
    sampled: bool
    parent_id: str | None = None

    @classmethod
    def parse(cls, traceparent: str) -> TraceContext | None:
        """None for one that is not valid: as the standard has it, a trace begins anew then."""
        version, *parts = traceparent.split("-")
        if (
            not re.fullmatch(r"[0-9a-f]{2}", version)
            or version == "ff"
            or len(parts) < 3
            or (version == "00" and len(parts) > 3)
        ):
            return None
        trace_id, span_id, flags = parts[:3]
        is_hex = (re.fullmatch(f"[0-9a-f]{{{length}}}", part) for part, length in zip(parts, _LENGTHS, strict=False))
        if not (all(is_hex) and int(trace_id, 16) and int(span_id, 16)):
            return None
        return cls(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))

    @classmethod
    def begin(cls, ratio: float) -> TraceContext:
        """A new trace, of which `ratio` are sampled."""
        trace_id = secrets.token_hex(16)
        return cls(trace_id, secrets.token_hex(8), int(trace_id[16:], 16) < ratio * 2**64)

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"

    def child(self, name: str) -> TraceContext:
        """The span `name` under this one. Its id follows from both: whoever knows them need not be told."""
        digest = hashlib.blake2b(f"{self.trace_id}{self.span_id}{name}".encode(), digest_size=8)
        return TraceContext(self.trace_id, digest.hexdigest(), self.sampled, self.span_id)


# Of the request that the running task serves; None where nobody traces it.
CURRENT_TRACE: ContextVar[TraceContext | None] = ContextVar("current_trace", default=None)


@dataclass(frozen=True, slots=True)
class Span:
    """`error` empty: none. Times are Unix time."""

    name: str
    context: TraceContext
    start_unix_s: float
    end_unix_s: float
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)
    error: str = ""
    kind: Literal["server", "internal"] = "internal"


class Spans:
    """Where a process's spans go: to `export`, or nowhere."""

    def __init__(self, export: Callable[[Span], None] | None) -> None:
        self._export = export

    @property
    def are_wanted(self) -> bool:
        return self._export is not None

    def add(self, span: Span) -> None:
        if self._export is not None and span.context.sampled:
            self._export(span)

    def add_below(
        self, traceparent: str, name: str, start_s: float, attributes: Mapping[str, str | int], error: str = ""
    ) -> None:
        """A span from `start_s`, on the monotonic clock, until now."""
        if self._export is None or (parent := TraceContext.parse(traceparent)) is None:
            return
        now_s = time.time()
        start_unix_s = now_s - (time.monotonic() - start_s)
        self.add(Span(name, parent.child(name), start_unix_s, now_s, attributes, error))

    @contextmanager
    def below(self, traceparent: str, name: str) -> Iterator[None]:
        """A span for as long as the block. A cancellation is no error of it."""
        start_s, error = time.monotonic(), ""
        try:
            yield
        except SegueError as failure:
            error = failure.message
            raise
        finally:
            self.add_below(traceparent, name, start_s, {}, error)


NO_SPANS = Spans(None)
