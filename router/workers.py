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
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import grpc
import grpc.aio

from router.fleet import Fleet, WorkerFacts
from segue.cluster_secret import ClusterSecret, differing_secret
from segue.errors import SegueError, StoreUnavailable, WorkerLost, error_from_code
from segue.link_tls import CHANNEL_OPTIONS as TLS_OPTIONS
from segue.link_tls import LinkCredentials
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

Call = grpc.aio.StreamStreamCall[worker_pb2.LinkRequest, worker_pb2.LinkResponse]


@dataclass(frozen=True, slots=True)
class LineEvent:
    """What a line hears: a message of its worker, its part of a decode step, or the error that ends it there."""

    link: WorkerLink
    said: worker_pb2.LinkResponse | worker_pb2.SequenceTokens | SegueError


class Charge(NamedTuple):
    """What a router's sequences take of a worker: tokens of prompts that have no first token yet; sequences that decode there
    or will, of these those without a ticket yet, and the KV blocks that their prompts need."""

    tokens: int = 0
    sequences: int = 0
    unreserved: int = 0
    blocks: int = 0


class WorkerLink:
    """One worker of one epoch. Lives from its first record until the link breaks or its lease lapses."""

    def __init__(
        self,
        record: worker_pb2.WorkerRecord,
        router_id: str,
        fleet: Fleet,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """`credentials` None: the cluster has no secret."""
        self.record = record
        self._credentials = credentials
        self._fleet = fleet
        self.load = inference_pb2.WorkerLoad()
        self.is_open = False
        # How often the worker has said of itself what it is now.
        self.num_changes = 0
        # When membership stopped showing the worker, on the monotonic clock.
        self.absent_since_s: float | None = None
        self._num_silent_ticks = 0
        # This router's own part, and what that was when the worker told its load last.
        self.charged = Charge()
        self._charged_at_load = Charge()
        self._router_id = router_id
        self._outbox: asyncio.Queue[worker_pb2.LinkRequest] = asyncio.Queue()
        self._lines: dict[SequenceId, asyncio.Queue[LineEvent]] = {}
        # In the fleet, until it leaves that.
        self._row: int | None = fleet.join(self)

    @property
    def row(self) -> int:
        assert self._row is not None
        return self._row

    def leave_fleet(self) -> None:
        """To be called once, when the link is over."""
        self._fleet.leave(self.row)
        self._row = None

    def charge(self, *, tokens: int = 0, sequences: int = 0, unreserved: int = 0, blocks: int = 0) -> None:
        charged = self.charged
        self.charged = Charge(
            charged.tokens + tokens, charged.sequences + sequences, charged.unreserved + unreserved, charged.blocks + blocks
        )
        self._changed()

    def _changed(self) -> None:
        if self._row is not None:
            self._fleet.changed(self._row)

    @property
    def name(self) -> str:
        return f"{self.record.worker_id} (epoch {self.record.epoch})"

    @property
    def is_available(self) -> bool:
        return self.is_open and not self.record.draining and not self._is_stuck

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
            async with self._channel() as channel:
                call: Call = WorkerServiceStub(channel).Link()
                async with background(self._write(call)):
                    async for message in call:
                        self._deliver(message)
                        if message.HasField("opened") or message.HasField("worker_changed"):
                            wakeups.notify()
        except grpc.aio.AioRpcError as error:
            reason = f"{error.code().name}: {error.details()}"
        except WorkerLost as error:
            reason = error.message
        finally:
            self.is_open = False
            self._changed()
            wakeups.notify()
            self._lose_all(f"it said nothing for {MAX_SILENT_TICKS * TICK_S:g} s" if self.is_silent else reason)

    def _lose_all(self, reason: str) -> None:
        for events in self._lines.values():
            events.put_nowait(LineEvent(self, WorkerLost(f"worker {self.name} was lost: {reason}")))

    def _channel(self) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(self.record.address, options=LINK_OPTIONS)
        options = [*LINK_OPTIONS, *TLS_OPTIONS]
        return grpc.aio.secure_channel(self.record.address, self._credentials, options=options)

    async def _write(self, call: Call) -> None:
        """Sends what is in the outbox until the call is over; why it is, its reader hears."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(worker_pb2.LinkRequest(open=worker_pb2.OpenLink(router_id=self._router_id)))
            while True:
                await call.write(await self._outbox.get())

    def _deliver(self, message: worker_pb2.LinkResponse) -> None:
        self._num_silent_ticks = 0
        match message.WhichOneof("message"):
            case "opened":
                if message.opened.worker.epoch != self.record.epoch:
                    raise WorkerLost(f"epoch {message.opened.worker.epoch} answers at its address")
                self.is_open = True
                self._learn(message.opened.worker)
            case "load":
                self.load = message.load
                self._charged_at_load = self.charged
                self._changed()
                if self._is_stuck:
                    self._lose_all(f"a step of it has not ended for {MAX_STEP_S:g} s")
            case "worker_changed":
                self._learn(message.worker_changed.worker)
            case "cache_events":
                if self._row is not None:
                    self._fleet.hear_cache(self._row, message.cache_events)
            case "step_tokens":
                for sequence in message.step_tokens.sequences:
                    self._tell(sequence.key, sequence)
            case "failed":
                self._tell(message.failed.key, error_from_code(message.failed.code, message.failed.message))
            case None:
                pass  # a newer worker says something that this router does not know
            case kind:
                self._tell(getattr(message, kind).key, message)

    def _learn(self, record: worker_pb2.WorkerRecord) -> None:
        """What the worker itself says holds; its record in the membership store may be a moment older."""
        self.record = record
        self.num_changes += 1
        self._changed()

    def _tell(
        self, key: worker_pb2.SequenceKey, said: worker_pb2.LinkResponse | worker_pb2.SequenceTokens | SegueError
    ) -> None:
        if (events := self._lines.get(sequence_id(key))) is not None:
            events.put_nowait(LineEvent(self, said))

    def facts(self) -> WorkerFacts:
        record, load, before = self.record, self.load, self._charged_at_load
        return WorkerFacts(
            available=self.is_available,
            prefills="prefill" in record.roles,
            decodes="decode" in record.roles,
            layout=self._fleet.number(record.layout_fingerprint),
            formats=self._fleet.number(record.number_formats),
            host=self._fleet.number(record.host),
            pulls_kv=record.pulls_kv,
            block_size=record.block_size,
            capacity_tokens=self.capacity_tokens,
            # Of what it told, half a second ago perhaps, what was not this router's.
            queued_tokens=self.charged.tokens + max(load.queued_tokens - before.tokens, 0),
            sequences=self.charged.sequences + max(load.decode_sequences - before.sequences, 0),
            unreserved=self.charged.unreserved,
            # What ended since then is known with the next load only.
            available_blocks=max(load.free_blocks + load.cached_blocks - max(self.charged.blocks - before.blocks, 0), 0),
            prefill_ms_per_token=load.prefill_ms_per_token,
            decode_ms_per_step=load.decode_ms_per_step,
            decode_ms_per_sequence=load.decode_ms_per_sequence,
        )

    @property
    def capacity_tokens(self) -> int:
        return self.record.total_blocks * self.record.block_size

    def status(self) -> inference_pb2.WorkerStatus:
        record = self.record
        return inference_pb2.WorkerStatus(
            worker_id=record.worker_id,
            epoch=record.epoch,
            roles=record.roles,
            state=self._state,
            address=record.address,
            pid=record.pid,
            host=record.host,
            load=self.load,
            possible_roles=record.possible_roles,
            roles_until_unix_s=record.roles_until_unix_s,
            started_unix_s=record.started_unix_s,
        )

    @property
    def _state(self) -> str:
        if not self.is_open:
            return "lost"
        load = self.load
        is_idle = not (load.running_requests or load.waiting_requests or load.open_tickets or load.leased_blocks)
        return "ready" if not self.record.draining else "drained" if is_idle else "draining"


class Workers:
    """All workers that this router knows: membership says who should be there, links say who is."""

    def __init__(self, membership: Membership, router_id: str, model_name: str, secret: ClusterSecret | None = None) -> None:
        self._fingerprint = secret.fingerprint if secret is not None else ""
        self._credentials = LinkCredentials.of(secret).channel if secret is not None else None
        # Workers that are left out, so that each is told of once.
        self._strangers: set[tuple[str, int]] = set()
        self._membership = membership
        self._router_id = router_id
        self._model_name = model_name
        self.fleet = Fleet()
        # By worker id; the newest epoch only.
        self._links: dict[str, WorkerLink] = {}
        self._tasks: dict[WorkerLink, asyncio.Task[None]] = {}
        # Told whenever a link opens or breaks, or membership was read.
        self.changed = Wakeups()
        self.membership_fresh = False
        self.routers: list[worker_pb2.RouterRecord] = []
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
            self.routers = await self._membership.list_routers()
        except StoreUnavailable as error:
            if self.membership_fresh:
                logger.warning("going on with the workers known so far: %s", error.message)
            self.membership_fresh = False
        else:
            self.membership_fresh = True
            own = [record for record in records if record.model == self._model_name and self._is_member(record)]
            self._update({record.worker_id: record for record in own})

    def _is_member(self, record: worker_pb2.WorkerRecord) -> bool:
        """Whether it has this router's secret; one that has not is left out, and told of once."""
        who = f"worker {record.worker_id} at {record.address}"
        problem = differing_secret(who, record.secret_fingerprint, self._fingerprint)
        if problem is not None and (record.worker_id, record.epoch) not in self._strangers:
            self._strangers.add((record.worker_id, record.epoch))
            logger.error("%s", problem.message)
        return problem is None

    def _update(self, records: dict[str, worker_pb2.WorkerRecord]) -> None:
        now_s = time.monotonic()
        for worker_id, link in list(self._links.items()):
            record = records.get(worker_id)
            if record is not None and record.epoch == link.record.epoch:
                link.absent_since_s = None
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
        link = WorkerLink(record, self._router_id, self.fleet, self._credentials)
        self._links[record.worker_id] = link
        self._tasks[link] = asyncio.create_task(link.run(self.changed))

    def _close(self, link: WorkerLink) -> None:
        self._tasks.pop(link).cancel()
        link.leave_fleet()
