"""The worker's end of the link to its routers: one gRPC stream each, served for every role that the worker has.

A *leg* is one role's part in serving sequences. The link hands each message to the leg that it is for; when the link ends,
each leg drops what it had from that router.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import grpc
import grpc.aio

from segue.cache_feed import CacheFeed
from segue.errors import SegueError, WorkerLost
from segue.runtime import background
from segue.v1 import worker_pb2 as pb
from segue.v1.inference_pb2 import WorkerLoad
from segue.v1.worker_pb2_grpc import WorkerServiceServicer

logger = logging.getLogger(__name__)

LOAD_INTERVAL_S = 0.5
# What changes in the prefix cache is told at most so often,
CACHE_INTERVAL_S = 0.05
# and not while so many messages wait for the router to read them.
_MAX_WAITING_MESSAGES = 1000
LINK_OPTIONS = [
    # A prompt of a million tokens fits many times.
    ("grpc.max_receive_message_length", 64 * 2**20),
    ("grpc.max_send_message_length", 64 * 2**20),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # What a server allows its clients: their keepalive, also while nothing else is said.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Two workers must never share a port.
    ("grpc.so_reuseport", 0),
]

SequenceId = tuple[str, int]


def sequence_id(key: pb.SequenceKey) -> SequenceId:
    """Hashable form of a key."""
    return key.sequence_id, key.attempt


class RouterLink:
    """Where a leg sends what it has to say to one router. Sending never blocks; after the link ended it goes nowhere."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        # The router does not know what the prefix cache holds now, and needs a snapshot.
        self.needs_snapshot = True
        self._outbox: asyncio.Queue[pb.LinkResponse] = asyncio.Queue()

    def send(self, message: pb.LinkResponse) -> None:
        self._outbox.put_nowait(message)

    def send_failed(self, key: pb.SequenceKey, error: SegueError) -> None:
        self.send(pb.LinkResponse(failed=pb.SequenceFailed(key=key, code=error.code, message=error.message)))

    @property
    def is_behind(self) -> bool:
        return self._outbox.qsize() > _MAX_WAITING_MESSAGES

    async def next_message(self) -> pb.LinkResponse:
        return await self._outbox.get()


class Leg(Protocol):
    """One role of a worker: the prefill service or the decode service."""

    def handle(self, link: RouterLink, message: pb.LinkRequest) -> None:
        """Takes a message of this leg's kind; others, and keys it does not know, it ignores. Never blocks."""

    def drop(self, link: RouterLink) -> None:
        """Cancels every sequence that came over `link`."""

    def add_load(self, load: WorkerLoad) -> None:
        """Adds this leg's counts to `load`."""

    @property
    def num_sequences(self) -> int:
        """Sequences that hold anything here."""

    async def wait_empty(self) -> None:
        """Returns when no sequence holds anything here."""

    def give_up(self, error: SegueError) -> None:
        """Ends every sequence with `error`, a retryable one: their routers continue them elsewhere."""


class WorkerLinkServicer(WorkerServiceServicer):
    """Serves WorkerService.Link for `legs`. `record` and `load` give what the worker says of itself now; `operate` takes what
    operators say to it."""

    def __init__(
        self,
        legs: Sequence[Leg],
        record: Callable[[], pb.WorkerRecord],
        load: Callable[[], WorkerLoad],
        cache: CacheFeed,
        operate: Callable[[pb.LinkRequest], None],
    ) -> None:
        self._cache = cache
        self._legs = legs
        self._record = record
        self._load = load
        self._operate = operate
        self._links: set[RouterLink] = set()
        self._draining = record().draining

    def tell_changed(self) -> None:
        """Tells every router what the record says now. A draining worker takes no new sequences."""
        record = self._record()
        self._draining = record.draining
        for link in self._links:
            # Of now: from a load that is older than the draining, the worker could seem to be drained.
            link.send(pb.LinkResponse(load=self._load()))
            link.send(pb.LinkResponse(worker_changed=pb.WorkerChanged(worker=record)))

    async def tell_of_cache(self) -> None:
        """Keeps every router informed of the prefix cache. Runs until cancelled."""
        while True:
            await self._cache.changed.wait()
            self._tell_of_cache()
            await asyncio.sleep(CACHE_INTERVAL_S)

    def _tell_of_cache(self) -> None:
        events = self._cache.take()
        for link in self._links:
            if link.is_behind:
                link.needs_snapshot = True
            elif link.needs_snapshot:
                link.needs_snapshot = False
                link.send(pb.LinkResponse(cache_events=self._cache.snapshot()))
            elif events is not None:
                link.send(pb.LinkResponse(cache_events=events))

    async def Link(  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.LinkRequest],
        context: grpc.aio.ServicerContext[pb.LinkRequest, pb.LinkResponse],
    ) -> AsyncIterator[pb.LinkResponse]:
        first = await anext(aiter(request_iterator), pb.LinkRequest())
        if not first.HasField("open"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a link begins with OpenLink")
        link = RouterLink(first.open.router_id)
        self._links.add(link)
        link.send(pb.LinkResponse(opened=pb.LinkOpened(worker=self._record())))
        self._tell_of_cache()
        async with background(self._read(request_iterator, link), self._report_load(link)):
            try:
                while True:
                    yield await link.next_message()
            finally:
                self._links.discard(link)
                for leg in self._legs:
                    leg.drop(link)

    async def _report_load(self, link: RouterLink) -> None:
        while True:
            link.send(pb.LinkResponse(load=self._load()))
            await asyncio.sleep(LOAD_INTERVAL_S)

    async def _read(self, requests: AsyncIterator[pb.LinkRequest], link: RouterLink) -> None:
        async for message in requests:
            if self._draining and (key := _new_sequence(message)) is not None:
                link.send_failed(key, WorkerLost("the worker is draining"))
                continue
            self._operate(message)
            for leg in self._legs:
                leg.handle(link, message)


def _new_sequence(message: pb.LinkRequest) -> pb.SequenceKey | None:
    """The key of the sequence that `message` would start."""
    match message.WhichOneof("message"):
        case "start_prefill":
            return message.start_prefill.key
        case "reserve_decode":
            return message.reserve_decode.key
    return None
