"""One prompt on its way through a prefill worker."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from engine.sequence import Sequence
from kv_transfer.handover import HandOver, Reservation
from prefill_worker.outgoing import OutgoingKV
from segue.errors import InternalError, SegueError
from segue.runtime import event_that_is_set
from segue.sampling import GeneratedToken
from segue.v1 import worker_pb2 as pb
from segue.worker_link import RouterLink


@dataclass(eq=False, slots=True)
class PrefillJob:
    key: pb.SequenceKey
    link: RouterLink
    sequence: Sequence
    # False: one token is all that is wanted.
    hands_over: bool
    # Hashes of the prompt's full blocks.
    block_hashes: list[bytes]
    outgoing: OutgoingKV
    # Tensor-parallel ranks of the decode worker.
    num_decode_ranks: int
    # See segue.jobs.Job.
    traceparent: str = ""
    cached_tokens: int = 0
    # On the monotonic clock: when it came, and when it was first computed.
    arrived_s: float = field(default_factory=time.monotonic)
    computed_s: float | None = None
    # Fetched from the decode worker.
    pulled_tokens: int = 0
    num_published_blocks: int = 0
    first_token: asyncio.Future[GeneratedToken] = field(default_factory=asyncio.Future)
    # Done when the tickets came and the decode worker answered.
    hand_over: asyncio.Future[HandOver] = field(default_factory=asyncio.Future)
    opening: asyncio.Task[None] | None = None
    # Must be abandoned before the blocks are given back, whatever became of the job.
    opened: HandOver | None = None
    # Fetches what decode has of the prompt, before the rest is computed.
    pulling: asyncio.Task[None] | None = None
    # What decode may write for that; must be fenced before the blocks are given back.
    pulled: Reservation | None = None
    # Clear while a step computes this sequence: its blocks are being written.
    idle: asyncio.Event = field(default_factory=event_that_is_set)

    def on_task_end(self, task: asyncio.Task[None]) -> None:
        """A defect in one of the job's tasks ends the job, which would wait for it forever."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(InternalError(f"{task.get_name()} failed: {error!r}"))

    @property
    def queue_s(self) -> float:
        """How long it waited before any of it was computed, so far."""
        return (self.computed_s or time.monotonic()) - self.arrived_s

    @property
    def sending_s(self) -> float:
        """Since the first of its KV went out; 0 when none did."""
        first_s = self.outgoing.first_sent_s
        return 0.0 if first_s is None else time.monotonic() - first_s

    def fail(self, error: SegueError) -> None:
        """Ends the job with `error` wherever it waits now."""
        waiting_for = self.hand_over if self.first_token.done() else self.first_token
        if not waiting_for.done():
            waiting_for.set_exception(error)
            waiting_for.exception()  # asked for here, as a job that was cancelled meanwhile does not ask
