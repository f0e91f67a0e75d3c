"""What this router remembers of its requests: those that run, and the latest that are over. `segue explain` shows them.

A request is remembered from when it was found fit to be served until enough others have come after it, however it ended.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

from router.generation import GenerationDone, GenerationEvent
from router.sequence import SequencePath
from segue.errors import InternalError, RequestCancelled, SegueError
from segue.tracing import CURRENT_TRACE
from segue.v1 import operator_pb2 as pb

MAX_RECORDS = 1000
# Of a request that is over; one with many prompts and choices has thousands.
MAX_PATHS = 16
_ID_PREFIXES = ("req_", "chatcmpl-", "cmpl-")


class RequestRecord:
    """A request that runs. Whoever serves it fills `paths` as choices begin, and shows it every event."""

    def __init__(self, request_id: str, api: str, num_prompt_tokens: int, arrived_unix_s: float) -> None:
        self.request_id = request_id
        self.paths: dict[str, SequencePath] = {}
        self.error: SegueError | None = None
        self.is_over = False
        self.api = api
        self.num_prompt_tokens = num_prompt_tokens
        self.arrived_unix_s = arrived_unix_s
        self.trace = CURRENT_TRACE.get()
        self._done: list[GenerationDone] = []
        self._num_outputs_seen = 0

    def see(self, event: GenerationEvent) -> None:
        if isinstance(event, GenerationDone):
            self._done.append(event)
        else:
            self._num_outputs_seen += len(event.tokens)

    @property
    def num_output_tokens(self) -> int:
        """So far; at the end also what a stream that broke had before."""
        return max(sum(done.num_output_tokens for done in self._done), self._num_outputs_seen)

    @property
    def first_path(self) -> SequencePath | None:
        return next(iter(self.paths.values()), None)

    @property
    def failure(self) -> SegueError | None:
        return next((path.error for path in self.paths.values() if path.error is not None), self.error)

    def to_pb(self) -> pb.RequestRecord:
        failure = self.failure
        ending = "ok" if self.is_over else "running"
        begun_s = min((path.begun_s for path in self.paths.values()), default=None)
        return pb.RequestRecord(
            request_id=self.request_id,
            api=self.api,
            arrived_unix_s=self.arrived_unix_s,
            outcome=failure.code if failure is not None else ending,
            error=failure.message if failure is not None else "",
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            paths=[path.to_pb(begun_s) for path in islice(self.paths.values(), MAX_PATHS)],
        )


class Records:
    """`clock` gives Unix time; `on_over` is shown each request that is over."""

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        max_records: int = MAX_RECORDS,
        on_over: Callable[[RequestRecord], None] = lambda _: None,
    ) -> None:
        self._clock = clock
        self._on_over = on_over
        # By id, oldest first.
        self._running: dict[str, RequestRecord] = {}
        # Messages, not records: what a record refers to, errors with their frames among it, must not stay.
        self._over: deque[pb.RequestRecord] = deque(maxlen=max_records)

    @contextmanager
    def record(self, request_id: str, api: str, num_prompt_tokens: int) -> Iterator[RequestRecord]:
        """A request runs as long as the block."""
        record = self._running[request_id] = RequestRecord(request_id, api, num_prompt_tokens, self._clock())
        try:
            yield record
        except SegueError as error:
            record.error = error
            raise
        except (asyncio.CancelledError, GeneratorExit):
            record.error = RequestCancelled("the client went away")
            raise
        except BaseException as error:
            record.error = InternalError(repr(error))
            raise
        finally:
            record.is_over = True
            del self._running[request_id]
            self._over.append(record.to_pb())
            self._on_over(record)

    def find(self, request_id: str) -> pb.RequestRecord | None:
        """By the id of a request or of an OpenAI answer; None when it is not remembered (any more)."""
        request_id = _plain_id(request_id)
        if (running := self._running.get(request_id)) is not None:
            return running.to_pb()
        return next((record for record in reversed(self._over) if record.request_id == request_id), None)

    def latest(self, number: int) -> list[pb.RequestRecord]:
        """The newest first: those that run, then those that ended last."""
        running = [record.to_pb() for record in islice(reversed(self._running.values()), number)]
        return running + list(islice(reversed(self._over), number - len(running)))


def _plain_id(given: str) -> str:
    """The request's own id, for each of the forms in which clients see it."""
    for prefix in _ID_PREFIXES:
        if given.startswith(prefix):
            return _ID_PREFIXES[0] + given.removeprefix(prefix)
    return given
