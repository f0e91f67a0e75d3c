"""The senders that a receiver knows: which connection each has, how its bytes come, and whether it is still alive.

A sender whose connection broke may live on and still write into shared memory. It is kept here until its death, or its word on
another connection, proves that it has stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kv_transfer.identity import WorkerIdentity, host_identity
from kv_transfer.pairing import Roster
from kv_transfer.plan import RegionFormat, TargetRegions, format_of, mismatch
from kv_transfer.process_watch import ProcessWatch
from kv_transfer.protocol import DIST, LOCAL, SHM, TCP
from kv_transfer.sockets import keep_frame_memory
from kv_transfer.tensors import Memory, host_memory
from kv_transfer.transports import PushReader, ShmReader, TcpReader, choose_transport, region_format
from segue.v1 import transfer_pb2 as pb

if TYPE_CHECKING:
    from kv_transfer.distributed import Channel, Rendezvous

# An honest sender announces one push and hands it over before the next: more are a flood.
_MAX_WAITING_FRAMES = 1024
FrameSink = Callable[[pb.TransferFrame], None]


@dataclass(eq=False, slots=True)
class Writer:
    """One connection. `number` is that of its Hello; `watch` is there for shm alone."""

    sender_id: int
    number: int
    transport: str
    post: FrameSink
    watch: ProcessWatch | None = None
    # For dist alone: what payloads come by, and the frames that wait for those before them.
    channel: Channel | None = None
    inbox: asyncio.Queue[pb.TransferFrame] = field(default_factory=lambda: asyncio.Queue(_MAX_WAITING_FRAMES))

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
        if self.watch is not None:
            self.watch.close()


class Writers:
    """`post` sends a frame to a connection; `on_death` is told when the process of a shared-memory writer is gone."""

    def __init__(
        self,
        identity: WorkerIdentity,
        memory: Memory,
        transports: Sequence[str],
        post: Callable[[bytes, pb.TransferFrame], None],
        on_death: Callable[[Writer], None],
        wire_dtype: str,
        rendezvous: Rendezvous | None,
    ) -> None:
        self._identity = identity
        self._memory = memory
        self._transports = transports
        self._post = post
        self._on_death = on_death
        self._format = format_of(memory.layout, wire_dtype)
        self._rendezvous = rendezvous
        self._host = host_identity()
        self._roster = Roster[Writer]()

    def get(self, connection: bytes) -> Writer | None:
        return self._roster.connected.get(connection)

    def add_local(self, post: FrameSink) -> Writer:
        return Writer(0, 0, LOCAL, post)

    def region_format(self, writer: Writer, ticket: pb.Ticket) -> RegionFormat:
        """How the ticket's regions travel when `writer` sends them."""
        return region_format(ticket, self._memory.layout, writer.transport, self._format.wire_dtype)

    def reader(self, writer: Writer, ticket: pb.Ticket) -> PushReader:
        """What takes the ticket's regions in when `writer` sends them."""
        form = self.region_format(writer, ticket)
        if writer.transport == DIST:
            from kv_transfer.distributed import DistReader, TensorTarget

            return DistReader(TensorTarget(self._memory, form))
        target = TargetRegions(host_memory(self._memory), form)
        return TcpReader(target) if writer.transport == TCP else ShmReader(target)

    def welcome(self, connection: bytes, hello: pb.Hello) -> list[Writer]:
        """Answers a Hello. Returns the writers that it says have stopped: the same sender's earlier ones."""
        stopped = self._roster.greet(connection, hello.sender_id, hello.number)
        if stopped is None:
            return []
        for writer in stopped:
            writer.close()
        self._post(connection, pb.TransferFrame(welcome=self._answer(connection, hello)))
        return stopped

    def refuse(self, connection: bytes) -> None:
        """Tells a connection that it has to be made anew."""
        welcome = pb.Welcome(
            worker_id=self._identity.worker_id, epoch=self._identity.epoch, refusal="this connection is not known (any more)"
        )
        self._post(connection, pb.TransferFrame(welcome=welcome))

    def lose(self, connection: bytes) -> Writer | None:
        """The connection is gone. Returns its writer, if it had one."""
        return self._roster.lose(connection)

    def tick(self, busy: Container[object]) -> None:
        """Finds out which connections are gone, and forgets lost writers that have no ticket (are not among `busy`)."""
        for connection in list(self._roster.connected):
            self._post(connection, pb.TransferFrame(ping=pb.Ping()))
        for writer in self._roster.forget_idle(busy):
            writer.close()

    def close(self) -> None:
        for writer in [*self._roster.connected.values(), *self._roster.lost]:
            writer.close()

    def _answer(self, connection: bytes, hello: pb.Hello) -> pb.Welcome:
        welcome = pb.Welcome(worker_id=self._identity.worker_id, epoch=self._identity.epoch, format=self._format)
        if hello.layout_fingerprint != self._identity.layout_fingerprint:
            welcome.refusal = f"{hello.worker_id} and {self._identity.worker_id} have different KV layouts or models"
            return welcome
        if problem := mismatch(hello.format, self._format):
            welcome.refusal = problem
            return welcome
        transport = choose_transport(hello, self._host, self._transports)
        writer = self._make_writer(connection, hello, transport) if transport else None
        if writer is None and transport == SHM:
            transport = choose_transport(hello, self._host, [name for name in self._transports if name != SHM])
            writer = self._make_writer(connection, hello, transport) if transport else None
        if writer is None:
            offered, accepted = ", ".join(hello.transports) or "none", ", ".join(self._transports)
            welcome.refusal = f"no transport works between the two: {offered} offered, {accepted} accepted"
            return welcome
        self._roster.add(connection, writer)
        welcome.transport = writer.transport
        if writer.transport == SHM:
            welcome.segment.CopyFrom(host_memory(self._memory).segment)
        if writer.transport == DIST and self._rendezvous is not None:
            writer.channel, meeting = self._rendezvous.invite(self._memory.tensor.device)
            welcome.rendezvous.CopyFrom(meeting)
        return welcome

    def _make_writer(self, connection: bytes, hello: pb.Hello, transport: str) -> Writer | None:
        """None when the process cannot be watched, without which shared memory could not be taken back from it."""

        def post(frame: pb.TransferFrame) -> None:
            self._post(connection, frame)

        if transport == TCP:
            keep_frame_memory()
        if transport != SHM:
            return Writer(hello.sender_id, hello.number, transport, post)
        writer = Writer(hello.sender_id, hello.number, transport, post)
        try:
            writer.watch = ProcessWatch(hello.host.pid, hello.host.pid_start_time, lambda: self._process_ended(writer))
        except OSError:
            return None
        return writer

    def _process_ended(self, writer: Writer) -> None:
        self._roster.remove(writer)
        self._on_death(writer)
