"""The decode side: hands out tickets for its KV blocks, takes what is pushed, and takes blocks back safely.

incoming = receiver.expect(first_block, block_ids)     the ticket travels to a prefill worker, by way of the router
arrival = await incoming.arrival()                     or a TransferError
incoming.accept()                                      the writer gets its receipt
await incoming.fence()                                 in any state: from here on nothing can write to the blocks
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self

import zmq
from google.protobuf.message import DecodeError

from kv_transfer.faults import NO_FAULTS, Faults
from kv_transfer.identity import WorkerIdentity
from kv_transfer.incoming import Arrival, Incoming, Intake
from kv_transfer.plan import shared_heads
from kv_transfer.protocol import (
    DIST,
    LOCAL,
    Failure,
    Frames,
    FreshRegions,
    ReceivingTicket,
    answer_without_ticket,
    named_ticket,
    unknown_ticket,
)
from kv_transfer.sockets import SocketKeys, bind_receiver
from kv_transfer.tensors import Memory
from kv_transfer.transports import MAX_PUSH_BYTES, Payload, PushReader, check_transports, is_quick
from kv_transfer.writers import Writer, Writers
from segue.errors import ChecksumMismatch, ConfigError, TransferError
from segue.kv_layout import KVLayout
from segue.v1 import transfer_pb2 as pb

if TYPE_CHECKING:
    from kv_transfer.distributed import Channel

logger = logging.getLogger(__name__)

__all__ = ["Arrival", "Incoming", "KVReceiver"]

# At least this often the receiver looks for leases that ran out and writers that went away.
_TICK_S = 0.5
# Pushes that were received and not yet checked; more wait in the socket, which slows their writers down.
_MAX_UNCHECKED_PUSHES = 8


class KVReceiver:
    """Receives into `memory` while it is entered. `lease_ms` is how long a ticket lives without a word from its writer;
    `wire_dtype` is the format in which KV travels over a network, where it is not as this memory stores it; with `keys` only
    senders that have them too are let in."""

    def __init__(
        self,
        identity: WorkerIdentity,
        memory: Memory,
        *,
        host: str,
        port: int = 0,
        transports: tuple[str, ...] = ("shm", "tcp"),
        lease_ms: int = 10_000,
        wire_dtype: str = "",
        clock: Callable[[], float] = time.monotonic,
        faults: Faults = NO_FAULTS,
        keys: SocketKeys | None = None,
    ) -> None:
        self._identity = identity
        self._memory = memory
        self._host = host
        self._port = port
        self._transports = check_transports(transports, memory)
        self._lease_ms = lease_ms
        self._wire_dtype = wire_dtype
        self._clock = clock
        self._faults = faults
        self._keys = keys
        self._ticket_ids = itertools.count(1)
        self._tickets: dict[int, Incoming] = {}
        self._slots = asyncio.Semaphore(_MAX_UNCHECKED_PUSHES)
        self.endpoint = ""
        self.num_bytes_received = 0
        self.num_failed = 0
        self.num_bad_frames = 0

    @property
    def num_open_tickets(self) -> int:
        """Given out and not over: what they name may still be written."""
        return len(self._tickets)

    async def __aenter__(self) -> Self:
        self._context = zmq.Context()
        try:
            longest = replace(self._memory.layout, dtype="float32").region_bytes
            router, self.endpoint = await bind_receiver(self._context, self._host, longest, self._port, self._keys)
        except ConfigError:
            self._context.destroy()
            raise
        self._socket = self._faults.receiving(router)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-receive")
        rendezvous = None
        if DIST in self._transports:
            from kv_transfer.distributed import Rendezvous

            rendezvous = Rendezvous(self._host)
        self._writers = Writers(
            self._identity, self._memory, self._transports, self._post, self._writer_died, self._wire_dtype, rendezvous
        )
        self._channels: set[asyncio.Task[None]] = set()
        self._tasks = [asyncio.create_task(run()) for run in (self._listen, self._keep_time)]
        for task in self._tasks:
            task.add_done_callback(self._on_task_end)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in (*self._tasks, *self._channels):
            task.cancel()
        await asyncio.gather(*self._channels, return_exceptions=True)
        ends = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_all(Failure(TransferError, "the receiver was closed"))
        self._writers.close()
        self._thread.shutdown()
        self._socket.close()
        self._context.destroy(linger=0)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    @property
    def layout(self) -> KVLayout:
        return self._memory.layout

    def expect(self, first_block: int, block_ids: Sequence[int], heads: range | None = None, writer_rank: int = 0) -> Incoming:
        """A ticket to write the prompt's blocks from `first_block` on into `block_ids`: some KV heads of them, or all, that
        lie with a rank of the prefill worker."""
        if len(set(block_ids)) != len(block_ids) or any(not 0 <= block < self._memory.num_blocks for block in block_ids):
            raise ValueError(f"block_ids: {list(block_ids)} are not different blocks of {self._memory.num_blocks}")
        return self._grant(self.endpoint, first_block, block_ids, heads or self.layout.heads, writer_rank)

    async def reserve(self, first_block: int, block_ids: Sequence[int], num_writers: int) -> list[Incoming]:
        """Tickets for a worker of `num_writers` ranks, one for each that has heads which lie in this memory. Raises
        TransferRefused when the heads cannot be shared out so."""
        shares = [(rank, shared_heads(self.layout, rank, num_writers)) for rank in range(num_writers)]
        return [self.expect(first_block, block_ids, heads, rank) for rank, heads in shares if heads]

    def expect_local(self, first_block: int = 0) -> Incoming:
        """A ticket for a sender in this very process, which hands its own blocks over."""
        return self._grant(f"{LOCAL}:", first_block, (), self.layout.heads, self.layout.rank)

    def connect_local(self, on_frame: Callable[[pb.TransferFrame], None]) -> Callable[[pb.TransferFrame], None]:
        """For a sender in this very process: takes what gets its frames, returns where it puts its own."""
        writer = self._writers.add_local(on_frame)
        return lambda frame: self._on_frame(writer, frame)

    def _grant(self, endpoint: str, first_block: int, block_ids: Sequence[int], heads: range, writer_rank: int) -> Incoming:
        ticket_id = next(self._ticket_ids)
        ticket = pb.Ticket(
            ticket_id=ticket_id,
            decode_worker_id=self._identity.worker_id,
            decode_epoch=self._identity.epoch,
            endpoint=endpoint,
            layout_fingerprint=self._identity.layout_fingerprint,
            first_block=first_block,
            block_ids=block_ids,
            lease_ms=self._lease_ms,
            block_size=self.layout.block_size,
            first_kv_head=heads.start,
            num_kv_heads=len(heads),
            writer_rank=writer_rank,
        )
        state = ReceivingTicket(
            ticket_id,
            self._identity.epoch,
            self.layout.num_layers,
            len(block_ids),
            self._lease_ms / 1000,
            self._clock(),
        )
        incoming = self._tickets[ticket_id] = Incoming(ticket, state, self._dispatch, self._faults)
        self._faults.step("granted")
        return incoming

    # From sockets to tickets

    async def _listen(self) -> None:
        while True:
            connection, *parts = await self._socket.receive()
            await self._on_message(connection.bytes, parts)

    async def _on_message(self, connection: bytes, parts: Sequence[zmq.Frame]) -> None:
        try:
            frame = pb.TransferFrame.FromString(parts[0].bytes if parts else b"")
        except DecodeError:
            self.num_bad_frames += 1
            return
        writer = self._writers.get(connection)
        if frame.HasField("hello"):
            for stopped in self._writers.welcome(connection, frame.hello):
                self._writer_died(stopped)
            greeted = self._writers.get(connection)
            if greeted is not None and greeted is not writer and greeted.channel is not None:
                task = asyncio.create_task(self._serve_channel(connection, greeted, greeted.channel))
                self._channels.add(task)
                task.add_done_callback(self._channels.discard)
        elif writer is None:
            # Nobody that we know (any more); a sender of ours makes a new connection when it hears that.
            self.num_bad_frames += 1
            self._writers.refuse(connection)
        elif writer.channel is not None:
            try:
                writer.inbox.put_nowait(frame)
            except asyncio.QueueFull:
                self._lose(connection)
        elif frame.HasField("push"):
            await self._take_push(writer, frame.push, [part.buffer for part in parts[1:]])
        else:
            self._on_frame(writer, frame)

    async def _serve_channel(self, connection: bytes, writer: Writer, channel: Channel) -> None:
        """Frames of a sender whose payloads come by a channel of their own: each waits for the payload before it."""
        try:
            await channel.join()
            while True:
                frame = await writer.inbox.get()
                if frame.HasField("push"):
                    num_bytes = frame.push.num_bytes
                    if not 0 < num_bytes <= max(MAX_PUSH_BYTES, self._memory.layout.region_bytes):
                        raise TransferError(f"a push of {num_bytes} bytes was announced")
                    # Also for a ticket that is over: what was announced must be taken.
                    await self._take_push(writer, frame.push, [await channel.receive(num_bytes)])
                else:
                    self._on_frame(writer, frame)
        except TransferError as error:
            logger.warning("lost a sender: %s", error.message)
            self._lose(connection)
        finally:
            channel.close()

    async def _take_push(self, writer: Writer, push: pb.Push, payload: Payload) -> None:
        await self._slots.acquire()
        if not self._on_push(writer, push, payload):
            self._slots.release()
        await asyncio.sleep(0)  # everything else on this event loop has its turn

    def _on_frame(self, writer: Writer, frame: pb.TransferFrame) -> None:
        ticket_id = named_ticket(frame)
        self.num_bad_frames += ticket_id is None
        incoming = self._tickets.get(ticket_id or 0)
        if incoming is not None and (incoming.ticket.endpoint == f"{LOCAL}:") == (writer.transport == LOCAL):
            region_bytes = self._writers.region_format(writer, incoming.ticket).region_bytes
            answers = incoming.state.on_frame(writer, writer.transport, region_bytes, frame, self._clock())
            self._dispatch(incoming, answers, writer)
        else:
            for answer in answer_without_ticket(frame):
                writer.post(answer)

    def _on_push(self, writer: Writer, push: pb.Push, payload: Payload) -> bool:
        """Whether a check was started, which frees its slot when it ends."""
        incoming = self._tickets.get(push.ticket_id)
        if incoming is None:
            writer.post(unknown_ticket(push.ticket_id))
            return False
        fresh, frames = incoming.state.push(writer, push, [part.nbytes for part in payload], self._clock())
        self.num_bad_frames += bool(frames)
        self._dispatch(incoming, frames, writer)
        if not fresh:
            return False
        intake = incoming.intake = incoming.intake or self._intake(writer, incoming.ticket)
        blocks = [incoming.block_ids[index] for index in fresh.indices]
        check = partial(_check, intake.reader, push, fresh, blocks, payload)
        if intake.is_quick:
            self._on_checked(incoming, len(fresh), check())
            return True
        checking = asyncio.get_running_loop().run_in_executor(self._thread, check)
        checking.add_done_callback(lambda checked: self._on_checked(incoming, len(fresh), checked.result()))
        return True

    def _intake(self, writer: Writer, ticket: pb.Ticket) -> Intake:
        form = self._writers.region_format(writer, ticket)
        return Intake(self._writers.reader(writer, ticket), is_quick(writer.transport, form, self._memory.layout))

    def _on_checked(self, incoming: Incoming, num_regions: int, failure: Failure | None) -> None:
        self._slots.release()
        if failure is None:
            self.num_bytes_received += num_regions * incoming.state.region_bytes
        self._dispatch(incoming, incoming.state.verified(num_regions, failure))

    def _dispatch(self, incoming: Incoming, frames: Frames, writer: Writer | None = None) -> None:
        """After every change of a ticket: those who wait are told, a ticket that is over is forgotten, answers go out."""
        state = incoming.state
        self.num_failed += incoming.notice()
        if state.is_fenced:
            self._tickets.pop(incoming.ticket.ticket_id, None)
        target = writer or state.writer
        if isinstance(target, Writer):
            for frame in frames:
                target.post(frame)

    # Time, and the end of writers

    async def _keep_time(self) -> None:
        interval_s = min(_TICK_S, self._lease_ms / 4000)
        last_s = self._clock()
        while True:
            await asyncio.sleep(interval_s)
            now_s = self._clock()
            # When this process was held up, words that came in time are still waiting to be read.
            was_held_up, last_s = now_s - last_s > 3 * interval_s, now_s
            for incoming in list(self._tickets.values()):
                self._dispatch(incoming, incoming.state.reminder())
                if not was_held_up:
                    self._dispatch(incoming, incoming.state.expire(now_s))
            self._writers.tick({incoming.state.writer for incoming in self._tickets.values()})

    def _post(self, connection: bytes, frame: pb.TransferFrame) -> None:
        """Never waits: a peer that is gone, or does not even read control frames, is a lost one."""
        try:
            self._socket.send_now([connection, frame.SerializeToString()])
        except zmq.ZMQError:
            asyncio.get_running_loop().call_soon(self._lose, connection)

    def _lose(self, connection: bytes) -> None:
        if (writer := self._writers.lose(connection)) is not None:
            for incoming in self._tickets_of(writer):
                incoming.state.writer_lost()
                self._dispatch(incoming, [])

    def _writer_died(self, writer: Writer) -> None:
        for incoming in self._tickets_of(writer):
            incoming.state.writer_stopped()
            self._dispatch(incoming, [])

    def _tickets_of(self, writer: Writer) -> list[Incoming]:
        return [incoming for incoming in self._tickets.values() if incoming.state.writer is writer]

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail_all(Failure(TransferError, f"the receiver broke down: {error!r}"))

    def _fail_all(self, failure: Failure) -> None:
        for incoming in list(self._tickets.values()):
            self._dispatch(incoming, incoming.state.revoke(failure))
            incoming.leave_open(failure)


def _check(reader: PushReader, push: pb.Push, regions: FreshRegions, blocks: Sequence[int], payload: Payload) -> Failure | None:
    """What was wrong with the push, if anything was. On the event loop, or on the transfer thread."""
    try:
        is_whole = reader.read(push.layer, regions, blocks, payload)
    except Exception as error:  # noqa: BLE001  # whatever it is, the ticket ends with it
        return Failure(TransferError, f"what was pushed for ticket {push.ticket_id} could not be taken: {error}")
    return None if is_whole else Failure(ChecksumMismatch, f"layer {push.layer} of ticket {push.ticket_id} arrived damaged")
