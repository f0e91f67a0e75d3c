"""The router's end of its links: one for each worker, opened when membership shows it, closed when it is lost.

A sequence takes part through a *line*: it sends to one worker and hears, in order, what that worker says of it. When the link
breaks, the worker says nothing or does not get on, or its lease lapses, each of its lines hears WorkerLost. Nothing is asked
twice: a broken link has cancelled, on the worker, all that came over it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass

import grpc
import grpc.aio

from router.placement import WorkerFacts
from segue.errors import SegueError, StoreUnavailable, WorkerLost, error_from_code
from segue.membership import Membership
from segue.runtime import Wakeups, background
from segue.v1 import inference_pb2, worker_pb2
from segue.v1.worker_pb2_grpc import WorkerServiceStub
from segue.worker_link import LINK_OPTIONS, SequenceId, sequence_id

logger = logging.getLogger(__name__)

MEMBERSHIP_INTERVAL_S = 0.5
# A lapsed lease may mean that the store lost its data, and every worker is about to write its record again.
ABSENCE_GRACE_S = 1.5


# How often the links are looked after.
TICK_S = 0.25
# A worker tells its load every half second, whatever it computes. One that says nothing for so many ticks hangs, or cannot be
# reached. Ticks of this process, not seconds: a router that was stopped itself blames nobody.
MAX_SILENT_TICKS = 10
# A worker that talks, but whose step does not end, hangs on its device.
MAX_STEP_S = 120.0


@dataclass(frozen=True, slots=True)
class LineEvent:
    """What a line hears: a message of its worker, or the error that ends it there."""

    link: WorkerLink
    said: worker_pb2.LinkResponse | SegueError


class WorkerLink:
    """One worker of one epoch. Lives from its first record until the link breaks or its lease lapses."""

    def __init__(self, record: worker_pb2.WorkerRecord, router_id: str) -> None:
        self.record = record
        self.load = inference_pb2.WorkerLoad()
        self.is_open = False
        self.draining = record.draining
        # When membership stopped showing the worker, on the monotonic clock.
        self.absent_since_s: float | None = None
        self._num_silent_ticks = 0
        # Charged by the coordinator, for as long as a sequence has the worker on that side.
        self.prefill_tokens = 0
        self.decode_sequences = 0
        self._router_id = router_id
        self._outbox: asyncio.Queue[worker_pb2.LinkRequest] = asyncio.Queue()
        self._lines: dict[SequenceId, asyncio.Queue[LineEvent]] = {}

    @property
    def name(self) -> str:
        return f"{self.record.worker_id} (epoch {self.record.epoch})"

    @property
    def is_available(self) -> bool:
        return self.is_open and not self.draining and not self._is_stuck

    @property
    def _is_stuck(self) -> bool:
        return self.load.step_age_ms > MAX_STEP_S * 1000

    @property
    def is_silent(self) -> bool:
        return self._num_silent_ticks > MAX_SILENT_TICKS

    def tick(self) -> None:
        """To be called every TICK_S."""
        if self.is_open:
            self._num_silent_ticks += 1

    def send(self, message: worker_pb2.LinkRequest) -> None:
        self._outbox.put_nowait(message)

    @contextmanager
    def line(self, key: worker_pb2.SequenceKey, events: asyncio.Queue[LineEvent]) -> Iterator[None]:
        """Puts what the worker says of `key` into `events` until the block ends, then cancels the sequence there."""
        if not self.is_open:
            raise WorkerLost(f"worker {self.name} was lost")
        self._lines[sequence_id(key)] = events
        try:
            yield
        finally:
            del self._lines[sequence_id(key)]
            self.send(worker_pb2.LinkRequest(cancel=worker_pb2.CancelSequence(key=key)))

    async def run(self, wakeups: Wakeups) -> None:
        """Serves the link until it breaks or this is cancelled; all lines then hear WorkerLost."""
        reason = "its link closed"
        try:
            async with grpc.aio.insecure_channel(self.record.address, options=LINK_OPTIONS) as channel:
                call = WorkerServiceStub(channel).Link(self._requests())
                async for message in call:
                    self._deliver(message)
                    if message.HasField("opened"):
                        wakeups.notify()
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except WorkerLost as error:
            reason = error.message
        finally:
            self.is_open = False
            wakeups.notify()
            self._lose_all(f"it said nothing for {MAX_SILENT_TICKS * TICK_S:g} s" if self.is_silent else reason)

    def _lose_all(self, reason: str) -> None:
        for events in self._lines.values():
            events.put_nowait(LineEvent(self, WorkerLost(f"worker {self.name} was lost: {reason}")))

    async def _requests(self) -> AsyncIterator[worker_pb2.LinkRequest]:
        yield worker_pb2.LinkRequest(open=worker_pb2.OpenLink(router_id=self._router_id))
        while True:
            yield await self._outbox.get()

    def _deliver(self, message: worker_pb2.LinkResponse) -> None:
        self._num_silent_ticks = 0
        match message.WhichOneof("message"):
            case "opened":
                if message.opened.worker.epoch != self.record.epoch:
                    raise WorkerLost(f"epoch {message.opened.worker.epoch} answers at its address")
                self.is_open = True
            case "load":
                self.load = message.load
                if self._is_stuck:
                    self._lose_all(f"a step of it has not ended for {MAX_STEP_S:g} s")
            case "draining":
                self.draining = True
            case "step_tokens":
                for sequence in message.step_tokens.sequences:
                    self._tell(sequence.key, worker_pb2.LinkResponse(step_tokens=worker_pb2.StepTokens(sequences=[sequence])))
            case "failed":
                self._tell(message.failed.key, error_from_code(message.failed.code, message.failed.message))
            case None:
                pass  # a newer worker says something that this router does not know
            case kind:
                self._tell(getattr(message, kind).key, message)

    def _tell(self, key: worker_pb2.SequenceKey, said: worker_pb2.LinkResponse | SegueError) -> None:
        if (events := self._lines.get(sequence_id(key))) is not None:
            events.put_nowait(LineEvent(self, said))

    def facts(self) -> WorkerFacts:
        record = self.record
        return WorkerFacts(
            worker_id=record.worker_id,
            roles=frozenset(record.roles),
            layout_fingerprint=record.layout_fingerprint,
            capacity_tokens=record.total_blocks * record.block_size,
            prefill_tokens=self.prefill_tokens,
            decode_sequences=self.decode_sequences,
            available_blocks=self.load.free_blocks + self.load.cached_blocks,
        )

    def status(self) -> inference_pb2.WorkerStatus:
        record = self.record
        state = "lost" if not self.is_open else "draining" if self.draining else "ready"
        return inference_pb2.WorkerStatus(
            worker_id=record.worker_id,
            epoch=record.epoch,
            roles=record.roles,
            state=state,
            address=record.address,
            pid=record.pid,
            host=record.host,
            load=self.load,
        )


class Charge:
    """What one sequence adds to the load of its workers, as this router counts it."""

    def __init__(self, prefill: WorkerLink, decode: WorkerLink, num_tokens: int) -> None:
        self._prefill: WorkerLink | None = prefill
        self._decode = decode
        self._num_tokens = num_tokens
        prefill.prefill_tokens += num_tokens
        decode.decode_sequences += 1

    def end_prefill(self) -> None:
        """The prompt is computed. Doing it twice does no harm."""
        if self._prefill is not None:
            self._prefill.prefill_tokens -= self._num_tokens
            self._prefill = None

    def end(self) -> None:
        self.end_prefill()
        self._decode.decode_sequences -= 1


@contextmanager
def charged(prefill: WorkerLink, decode: WorkerLink, num_tokens: int) -> Iterator[Charge]:
    """Charges both workers until the block ends."""
    charge = Charge(prefill, decode, num_tokens)
    try:
        yield charge
    finally:
        charge.end()


class Workers:
    """All workers that this router knows: membership says who should be there, links say who is."""

    def __init__(self, membership: Membership, router_id: str, model_name: str) -> None:
        self._membership = membership
        self._router_id = router_id
        self._model_name = model_name
        # By worker id; the newest epoch only.
        self._links: dict[str, WorkerLink] = {}
        self._tasks: dict[WorkerLink, asyncio.Task[None]] = {}
        # Told whenever a link opens or breaks, or membership was read.
        self.changed = Wakeups()
        self.membership_fresh = False
        # When each role last had an available worker, on the loop's clock.
        self.last_complete_s = float("-inf")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Workers]:
        """Follows membership until the block ends, then closes every link."""
        try:
            async with background(self._follow(), self._look_after()):
                yield self
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def available(self) -> list[WorkerLink]:
        return [link for link in self._links.values() if link.is_available]

    def missing_roles(self) -> list[str]:
        roles = {role for link in self.available() for role in link.record.roles}
        return [role for role in ("prefill", "decode") if role not in roles]

    def all(self) -> list[WorkerLink]:
        return list(self._links.values())

    async def _follow(self) -> None:
        async with aclosing(self._membership.changes(MEMBERSHIP_INTERVAL_S)) as changes:
            async for _ in changes:
                await self._look()

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for link, task in self._tasks.items():
                link.tick()
                if link.is_silent:
                    task.cancel()
            if not self.missing_roles():
                self.last_complete_s = asyncio.get_running_loop().time()

    async def _look(self) -> None:
        try:
            records = await self._membership.list_workers()
        except StoreUnavailable as error:
            if self.membership_fresh:
                logger.warning("going on with the workers known so far: %s", error.message)
            self.membership_fresh = False
        else:
            self.membership_fresh = True
            self._update({record.worker_id: record for record in records if record.model == self._model_name})

    def _update(self, records: dict[str, worker_pb2.WorkerRecord]) -> None:
        now_s = time.monotonic()
        for worker_id, link in list(self._links.items()):
            record = records.get(worker_id)
            if record is not None and record.epoch == link.record.epoch:
                link.absent_since_s = None
                link.draining |= record.draining
                continue
            link.absent_since_s = link.absent_since_s or now_s
            if record is not None or not link.is_open or now_s - link.absent_since_s > ABSENCE_GRACE_S:
                self._close(link)
                del self._links[worker_id]
        for worker_id, record in records.items():
            known = self._links.get(worker_id)
            if known is None or self._tasks[known].done():
                self._open(record)
        self.changed.notify()

    def _open(self, record: worker_pb2.WorkerRecord) -> None:
        """Also opens anew a link that broke while the worker's lease holds: it may have been the network."""
        if (old := self._links.get(record.worker_id)) is not None:
            self._close(old)
        link = WorkerLink(record, self._router_id)
        self._links[record.worker_id] = link
        self._tasks[link] = asyncio.create_task(link.run(self.changed))

    def _close(self, link: WorkerLink) -> None:
        self._tasks.pop(link).cancel()
