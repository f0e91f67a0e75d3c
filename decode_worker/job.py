"""One sequence on a decode worker."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from engine.sequence import Sequence
from kv_transfer.handover import HandOver, Reservation
from segue.errors import InternalError, SegueError
from segue.runtime import event_that_is_set
from segue.v1 import worker_pb2 as pb
from segue.worker_link import RouterLink


@dataclass(eq=False, slots=True)
class DecodeJob:
    key: pb.SequenceKey
    link: RouterLink
    sequence: Sequence
    # The KV is computed in this very process: blocks change hands, nothing is reserved or moved.
    is_local: bool
    # Tensor-parallel ranks of the worker that computes it.
    num_prefill_ranks: int
    # Hashes of the sequence's full blocks, as far as they are known; grows as tokens are decoded.
    block_hashes: list[bytes]
    # Of the prefix cache that the sequence may share.
    cache_salt: bytes = b""
    # See segue.jobs.Job.
    traceparent: str = ""
    num_published_blocks: int = 0
    # The tickets; must be fenced before the blocks are given back.
    reservation: Reservation | None = None
    # Sends prefill what it lacks of the prompt's beginning.
    returning: asyncio.Task[None] | None = None
    # Must be abandoned before the blocks are given back.
    returned: HandOver | None = None
    # Done when memory was leased (at once, if local).
    admitted: asyncio.Future[None] = field(default_factory=asyncio.Future)
    # Done when the last token is out; holds the error if there was one.
    finished: asyncio.Future[None] = field(default_factory=asyncio.Future)
    # Clear while a step computes this sequence.
    idle: asyncio.Event = field(default_factory=event_that_is_set)

    def on_return_end(self, returning: asyncio.Task[None]) -> None:
        """A defect there ends the job: it is of no use to go on and hide it."""
        if not returning.cancelled() and (error := returning.exception()) is not None:
            self.fail(InternalError(f"sending KV back failed: {error!r}"))

    def fail(self, error: SegueError) -> None:
        if not self.finished.done():
            self.finished.set_exception(error)
