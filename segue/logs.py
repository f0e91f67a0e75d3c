"""What a process logs, and whose work each line is about.

`log_context` says that for all that happens in a block and in the tasks begun there; no call that logs has to know it. As text
a line is for people; as JSON it is one object with the same names in every process:

    time (ISO 8601, UTC), level, logger, message; exception (with its trace) where there is one;
    request_id, sequence_id, trace_id, worker_id, router_id where they are known
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType, TracebackType

from segue.config import LogFormat

_TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# Of whom a line may tell; also by `extra` of a call that logs.
_WHOSE = ("request_id", "sequence_id", "trace_id", "worker_id", "router_id")

_CONTEXT: ContextVar[Mapping[str, str]] = ContextVar("log_context", default=MappingProxyType({}))


@contextmanager
def log_context(**fields: str) -> Iterator[None]:
    """Adds `fields`, of those named above, to what is logged in the block; empty ones are left out."""
    outer = _CONTEXT.get()
    _CONTEXT.set({**outer, **{name: value for name, value in fields.items() if value}})
    try:
        yield
    finally:
        _CONTEXT.set(outer)


def request_of(sequence_id: str) -> str:
    """The id of the request that a sequence is part of, which its own begins with."""
    return sequence_id.partition("-")[0]


def set_up_logging(log_format: LogFormat = "text", **process: str) -> None:
    """Everything this process logs goes to stderr. `process`, such as its worker_id, is in every line of JSON."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format=_TEXT_FORMAT, force=True)
    if log_format == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter(process))
        # What else would be written to stderr as it is.
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger(__name__).critical("the process ends", exc_info=(kind, error, trace))


class JsonFormatter(logging.Formatter):
    def __init__(self, process: Mapping[str, str]) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
            **_CONTEXT.get(),
            **{name: value for name in _WHOSE if (value := getattr(record, name, None))},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
