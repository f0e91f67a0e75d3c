"""The sequences that a leg serves: one task each, found by key, cancelled once, counted until they hold nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from typing import Generic, Protocol, TypeVar

from segue.errors import InternalError
from segue.runtime import event_that_is_set
from segue.v1 import worker_pb2 as pb
from segue.worker_link import RouterLink, SequenceId, sequence_id

logger = logging.getLogger(__name__)


class Job(Protocol):
    """One sequence on one leg."""

    key: pb.SequenceKey
    link: RouterLink


JobT = TypeVar("JobT", bound=Job)


class JobTable(Generic[JobT]):
    """Every job has a task that serves it from start to release; when the task ends, the job holds nothing any more."""

    def __init__(self) -> None:
        # Same keys in both. A task is cancelled at most once, so that its clean-up may await.
        self._jobs: dict[SequenceId, JobT] = {}
        self._tasks: dict[SequenceId, asyncio.Task[None]] = {}
        self._cancelled: set[SequenceId] = set()
        # Set while there are no jobs.
        self._empty = event_that_is_set()

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[JobT]:
        return iter(list(self._jobs.values()))

    def start(self, job: JobT, service: Coroutine[None, None, None]) -> None:
        """Serves `job`. A key that is already there fails the newcomer and leaves the first alone."""
        key = sequence_id(job.key)
        if key in self._jobs:
            service.close()
            job.link.send_failed(job.key, InternalError(f"sequence {key} is already being served here"))
            return
        self._jobs[key] = job
        self._empty.clear()
        self._tasks[key] = task = asyncio.create_task(service)
        task.add_done_callback(lambda task: self._on_done(job, task))

    def get(self, key: pb.SequenceKey) -> JobT | None:
        return self._jobs.get(sequence_id(key))

    def cancel(self, key: pb.SequenceKey) -> None:
        found = sequence_id(key)
        if found in self._tasks and found not in self._cancelled:
            self._cancelled.add(found)
            # Not at once: a task that is cancelled before its first step never reaches its clean-up.
            asyncio.get_running_loop().call_soon(self._tasks[found].cancel)

    def drop(self, link: RouterLink) -> None:
        for job in self:
            if job.link is link:
                self.cancel(job.key)

    async def wait_empty(self) -> None:
        """Returns when every job is released."""
        await self._empty.wait()

    def _on_done(self, job: JobT, task: asyncio.Task[None]) -> None:
        key = sequence_id(job.key)
        del self._jobs[key], self._tasks[key]
        self._cancelled.discard(key)
        if not self._jobs:
            self._empty.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("serving sequence %s failed", key, exc_info=error)
            job.link.send_failed(job.key, InternalError(f"{type(error).__name__}: {error}"))
