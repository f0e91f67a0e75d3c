"""The sequences that a leg serves: one task each, found by key, cancelled at any time, counted until they hold nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from segue.errors import InternalError, SegueError
from segue.logs import log_context, request_of
from segue.runtime import event_that_is_set
from segue.tracing import TraceContext
from segue.v1 import worker_pb2 as pb
from segue.worker_link import RouterLink, SequenceId, sequence_id

logger = logging.getLogger(__name__)


class Job(Protocol):
    """One sequence on one leg."""

    key: pb.SequenceKey
    link: RouterLink
    # Of the router's span of this attempt; empty where the request is not traced.
    traceparent: str


JobT = TypeVar("JobT", bound=Job)


@dataclass(eq=False, slots=True)
class _Entry(Generic[JobT]):
    job: JobT
    task: asyncio.Task[None] | None = None
    # From here on the task cannot be cancelled any more.
    is_releasing: bool = False


class JobTable(Generic[JobT]):
    """Every job has a task that serves and then releases it; when the task ends, the job holds nothing any more."""

    def __init__(self) -> None:
        self._entries: dict[SequenceId, _Entry[JobT]] = {}
        # Set while there are no jobs.
        self._empty = event_that_is_set()

    def __len__(self) -> int:
        return len(self._entries)

    def start(self, job: JobT, service: Coroutine[None, None, None], release: Callable[[JobT], Awaitable[None]]) -> bool:
        """Runs `service`, which a cancellation may end at any await, then `release`, which nothing interrupts.

        A key that is already there fails the newcomer and leaves the first alone: False, and nothing runs.
        """
        key = sequence_id(job.key)
        if key in self._entries:
            service.close()
            job.link.send_failed(job.key, InternalError(f"sequence {key} is already being served here"))
            return False
        self._entries[key] = entry = _Entry(job)
        self._empty.clear()
        sequence, trace = job.key.sequence_id, TraceContext.parse(job.traceparent)
        with log_context(
            request_id=request_of(sequence), sequence_id=sequence, trace_id=trace.trace_id if trace is not None else ""
        ):
            entry.task = asyncio.create_task(self._live(entry, service, release))
            entry.task.add_done_callback(lambda task: self._on_done(key, job, task))
        return True

    def get(self, key: pb.SequenceKey) -> JobT | None:
        entry = self._entries.get(sequence_id(key))
        return entry.job if entry is not None else None

    def cancel(self, key: pb.SequenceKey) -> None:
        if (entry := self._entries.get(sequence_id(key))) is not None:
            # Not at once: a task that is cancelled before its first step never reaches its release.
            asyncio.get_running_loop().call_soon(self._cancel, entry)

    def drop(self, link: RouterLink) -> None:
        for entry in self._entries.values():
            if entry.job.link is link:
                self.cancel(entry.job.key)

    def give_up(self, error: SegueError) -> None:
        """Ends every job that is not over with `error`."""
        for entry in self._entries.values():
            if not entry.is_releasing:
                entry.job.link.send_failed(entry.job.key, error)
                self.cancel(entry.job.key)

    async def wait_empty(self) -> None:
        """Returns when every job is released."""
        await self._empty.wait()

    @staticmethod
    def _cancel(entry: _Entry[JobT]) -> None:
        if entry.task is not None and not entry.is_releasing:
            entry.task.cancel()

    @staticmethod
    async def _live(
        entry: _Entry[JobT], service: Coroutine[None, None, None], release: Callable[[JobT], Awaitable[None]]
    ) -> None:
        try:
            await service
        finally:
            entry.is_releasing = True
            await release(entry.job)

    def _on_done(self, key: SequenceId, job: JobT, task: asyncio.Task[None]) -> None:
        del self._entries[key]
        if not self._entries:
            self._empty.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("serving sequence %s failed", key, exc_info=error)
            job.link.send_failed(job.key, InternalError(f"{type(error).__name__}: {error}"))
