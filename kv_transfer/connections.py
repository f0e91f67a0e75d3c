"""The way from a sender to one receiver: over a socket, or within the process.

A remote one lives from its Hello to the first sign that the receiver is gone, and is never repaired: the next push makes a new
one. Before that says Hello, every write of the old one has ended, as its Hello tells the receiver. Where the receiver waits for
just that, as it does over shared memory, the old one says so itself, on a connection for nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import zmq
from google.protobuf.message import DecodeError

from kv_transfer.faults import Faults, FrameSocket
from kv_transfer.identity import WorkerIdentity, host_identity
from kv_transfer.memory import KVMemory, is_open_at_owner
from kv_transfer.pairing import check_welcome
from kv_transfer.plan import SourceRegions, TargetRegions, format_of, mismatch, peer_layout
from kv_transfer.protocol import DIST, LOCAL, SHM, Failure, answer_without_push, named_ticket
from kv_transfer.push import Push
from kv_transfer.receiver import KVReceiver
from kv_transfer.sockets import AsyncSocket, SocketKeys, connected_sender, connection_loss
from kv_transfer.tensors import Memory, host_memory
from kv_transfer.transports import Payload, PushWriter, RegionSource, ShmWriter, TcpWriter, region_format
from segue.errors import TransferError, TransferRefused
from segue.v1 import transfer_pb2 as pb

if TYPE_CHECKING:
    from kv_transfer.distributed import Channel

logger = logging.getLogger(__name__)

_WELCOME_TIMEOUT_S = 5.0
# A receiver pings twice a second. One that was not heard for so many ticks of this process's own clock hangs or is cut off;
# a process that was stopped itself blames nobody.
_TICK_S = 0.5
_MAX_SILENT_TICKS = 5
# How long the last words of a connection may take to leave.
_CLOSE_TIMEOUT_S = 1.0
# Between two tries to tell a receiver that writing has ended.
_TELL_AGAIN_S = 0.5


class _Connection(ABC):
    """What both kinds share: the open pushes, who gets which frame, and the renewal of leases."""

    def __init__(self, transport: str) -> None:
        self.transport = transport
        self._pushes: dict[int, Push] = {}
        self._has_pushes = asyncio.Event()

    @abstractmethod
    def path_of(self, ticket: pb.Ticket) -> tuple[RegionSource, PushWriter] | None: ...

    @abstractmethod
    def post(self, frame: pb.TransferFrame, payload: Payload = (), is_wanted: Callable[[], bool] | None = None) -> None: ...

    @property
    def num_pushes(self) -> int:
        return len(self._pushes)

    def attach(self, push: Push) -> None:
        self._pushes[push.ticket.ticket_id] = push
        self._has_pushes.set()

    def forget(self, push: Push) -> None:
        self._pushes.pop(push.ticket.ticket_id, None)
        if not self._pushes:
            self._has_pushes.clear()

    def _deliver(self, frame: pb.TransferFrame) -> None:
        push = self._pushes.get(named_ticket(frame) or 0)
        if push is not None:
            push.on_frame(frame)
        else:
            for answer in answer_without_push(frame):
                self.post(answer)

    async def _renew(self) -> None:
        """Says, three times in each lease, which tickets are still worked on, and asks again for what was not answered."""
        while True:
            await self._has_pushes.wait()
            await asyncio.sleep(min(push.ticket.lease_ms for push in self._pushes.values()) / 3000)
            for push in list(self._pushes.values()):
                for frame in push.reminder():
                    self.post(frame)

    async def _abandon_all(self, reason: str) -> None:
        for push in list(self._pushes.values()):
            await push.abandon(reason)

    async def _fail_all(self, failure: Failure) -> None:
        """Ends all pushes; returns when none of them writes any more."""
        pushes = list(self._pushes.values())
        for push in pushes:
            push.fail(failure)
        for push in pushes:
            await push.stopped()


class LocalConnection(_Connection):
    """To the receiver of this very process: frames are plain calls, bytes stay where they are."""

    def __init__(self, receiver: KVReceiver) -> None:
        super().__init__(LOCAL)
        self._call = receiver.connect_local(self._deliver)
        self._renewing: asyncio.Task[None] | None = None

    def path_of(self, ticket: pb.Ticket) -> None:
        return None

    def post(self, frame: pb.TransferFrame, payload: Payload = (), is_wanted: Callable[[], bool] | None = None) -> None:
        self._call(frame)

    def start(self) -> None:
        self._renewing = asyncio.create_task(self._renew())

    async def close(self) -> None:
        await self._abandon_all("the sender was closed")
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)


class RemoteConnection(_Connection):
    """To the receiver at `endpoint` in the life named by `epoch`. `start` it; `ready` is set when it can be used or failed."""

    def __init__(
        self,
        context: zmq.SyncContext,
        ticket: pb.Ticket,
        identity: WorkerIdentity,
        memory: Memory,
        transports: Sequence[str],
        sender_id: int,
        wire_dtype: str,
        hello_numbers: Iterator[int],
        faults: Faults,
        keys: SocketKeys | None,
    ) -> None:
        super().__init__("")
        self.epoch = ticket.decode_epoch
        self.ready = asyncio.Event()
        self.failure: Failure | None = None
        # Failed, and nothing of it is written any more.
        self._has_stopped = False
        self._is_closed = False
        self._context = context
        self._endpoint = ticket.endpoint
        self._peer = ticket.decode_worker_id
        self._identity = identity
        self._memory = memory
        self._transports = transports
        self._sender_id = sender_id
        self._format = format_of(memory.layout, wire_dtype)
        self._hello_numbers = hello_numbers
        self._faults = faults
        self._keys = keys
        self._num_silent_ticks = 0
        # How the receiver stores KV, from its Welcome on; and over shared memory its cache itself.
        self._target_layout = memory.layout
        self._target: KVMemory | None = None
        # The memory of a receiver that has to be told when this connection is lost; empty when there is none.
        self.untold_segment = pb.SharedSegment()
        # What payloads go by, other than frames.
        self._channel: Channel | None = None
        self._outgoing: deque[tuple[pb.TransferFrame, Payload, Callable[[], bool] | None]] = deque()
        self._has_outgoing = asyncio.Event()
        self._has_none_outgoing = asyncio.Event()
        self._has_none_outgoing.set()
        self._task: asyncio.Task[None] | None = None

    def post(self, frame: pb.TransferFrame, payload: Payload = (), is_wanted: Callable[[], bool] | None = None) -> None:
        if self.failure is not None:
            return
        self._outgoing.append((frame, payload, is_wanted))
        self._has_none_outgoing.clear()
        self._has_outgoing.set()

    def path_of(self, ticket: pb.Ticket) -> tuple[RegionSource, PushWriter]:
        form = region_format(ticket, self._target_layout, self.transport, self._format.wire_dtype)
        own = self._memory.layout.heads
        if not form.heads or form.heads.start < own.start or form.heads.stop > own.stop:
            raise TransferRefused(f"{self._peer} wants KV heads {form.heads}; {self._identity.worker_id} has {own}")
        if ticket.block_size != form.layout.block_size:
            raise TransferRefused(f"a ticket for blocks of {ticket.block_size} tokens, but {self._peer} has others")
        if self._channel is not None:
            from kv_transfer.distributed import DistWriter, TensorSource

            return TensorSource(self._memory, form), DistWriter(form.region_bytes)
        source = SourceRegions(host_memory(self._memory), form)
        writer = ShmWriter(TargetRegions(self._target, form)) if self._target else TcpWriter(form.region_bytes)
        return source, self._faults.writer(writer)

    def start(self, after: RemoteConnection | None) -> None:
        """`after` is the connection that this one replaces."""
        self._task = asyncio.create_task(self._run(after))

    async def close(self) -> None:
        """Abandons what is open; returns when nothing of it will be written any more."""
        self._is_closed = True
        if self.ready.is_set() and self.failure is None:
            await self._abandon_all("the connection was closed")
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._has_none_outgoing.wait()
        if self._task is not None:
            # The wait for the last writes of one that fails already must not be cut short: neither by a cancellation here, nor
            # by one of this call, which gather would pass on.
            if self.failure is None or self._has_stopped:
                self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self, after: RemoteConnection | None) -> None:
        failure = Failure(TransferError, f"the connection to {self._peer} was closed")
        try:
            if after is not None:
                await after.close()
                # What that one could not tell any more is for this one to tell.
                self.untold_segment = after.untold_segment
            with connected_sender(self._context, self._endpoint, self._keys) as (dealer, monitor):
                socket = self._faults.sending(dealer)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._watch(monitor))
                    await self._shake_hands(socket)
                    self.ready.set()
                    for work in (self._read(socket), self._write(socket), self._renew(), self._listen_for_silence()):
                        group.create_task(work)
        except* TransferError as group_error:
            error = group_error.exceptions[0]
            failure = Failure(type(error), str(error)) if isinstance(error, TransferError) else failure
        finally:
            self.failure = failure
            self.ready.set()
            self._has_none_outgoing.set()
            await self._fail_all(failure)
            self._has_stopped = True
            if self._target is not None:
                self._target.close()
            if self._channel is not None:
                self._channel.close()
        # Lost, not closed: who closes has said all that there is to say.
        await self._tell_that_writing_ended()

    async def _tell_that_writing_ended(self) -> None:
        """Until then the receiver keeps blocks in quarantine. Ends when it has heard, or is gone itself."""
        # A loss at the very moment of a cancellation hides it, so that closing needs a word of its own.
        while not self._is_closed and is_open_at_owner(self.untold_segment):
            try:
                with connected_sender(self._context, self._endpoint, self._keys) as (dealer, monitor):
                    async with asyncio.TaskGroup() as group:
                        watching = group.create_task(self._watch(monitor))
                        await self._greet(self._faults.sending(dealer), (SHM,))
                        watching.cancel()
                self.untold_segment = pb.SharedSegment()
            except* TransferError as lost:
                logger.info("%s was not told yet that writing has ended: %s", self._peer, lost.exceptions[0])
            await asyncio.sleep(_TELL_AGAIN_S)

    async def _shake_hands(self, socket: FrameSocket) -> None:
        """Agrees on a transport. When shared memory was agreed on and cannot be opened, asks again without it."""
        welcome = await self._greet(socket, self._transports)
        self.untold_segment = welcome.segment
        if welcome.transport == SHM:
            try:
                self._target = await asyncio.to_thread(KVMemory.open, self._target_layout, welcome.segment)
            except TransferError as error:
                others = [name for name in self._transports if name != SHM]
                if not others:
                    raise TransferRefused(error.message) from None
                welcome = await self._greet(socket, others)
        if welcome.transport == DIST:
            from kv_transfer.distributed import Channel

            device = self._memory.tensor.device
            self._channel = await Channel.join_as_sender(self._endpoint, welcome.rendezvous, device)
        self.transport = welcome.transport

    async def _greet(self, socket: FrameSocket, transports: Sequence[str]) -> pb.Welcome:
        identity = self._identity
        hello = pb.Hello(
            worker_id=identity.worker_id,
            epoch=identity.epoch,
            layout_fingerprint=identity.layout_fingerprint,
            host=host_identity(),
            transports=transports,
            sender_id=self._sender_id,
            format=self._format,
            number=next(self._hello_numbers),
        )
        await socket.send([pb.TransferFrame(hello=hello).SerializeToString()])
        try:
            async with asyncio.timeout(_WELCOME_TIMEOUT_S):
                while not (frame := await _receive(socket, self._peer)).HasField("welcome"):
                    pass
        except TimeoutError:
            raise TransferError(f"{self._peer} did not answer a Hello within {_WELCOME_TIMEOUT_S:g} s") from None
        welcome = frame.welcome
        check_welcome(welcome, self._peer, self.epoch, transports)
        if problem := mismatch(self._format, welcome.format):
            raise TransferRefused(problem)
        self._target_layout = peer_layout(self._memory.layout, welcome.format)
        return welcome

    async def _read(self, socket: FrameSocket) -> None:
        while True:
            frame = await _receive(socket, self._peer)
            self._num_silent_ticks = 0
            if frame.welcome.refusal:
                raise TransferError(f"{self._peer}: {frame.welcome.refusal}")
            self._deliver(frame)

    async def _write(self, socket: FrameSocket) -> None:
        while True:
            await self._has_outgoing.wait()
            while self._outgoing:
                frame, payload, is_wanted = self._outgoing.popleft()
                if is_wanted is not None and not is_wanted():
                    continue
                if self._channel is None:
                    await socket.send([frame.SerializeToString(), *payload])
                    continue
                if payload:
                    frame.push.num_bytes = sum(part.nbytes for part in payload)
                await socket.send([frame.SerializeToString()])
                for part in payload:
                    await self._channel.send(part)
            self._has_outgoing.clear()
            self._has_none_outgoing.set()

    async def _listen_for_silence(self) -> None:
        """Raises TransferError when the receiver says nothing any more."""
        while self._num_silent_ticks <= _MAX_SILENT_TICKS:
            await asyncio.sleep(_TICK_S)
            self._num_silent_ticks += 1
        raise TransferError(f"{self._peer} said nothing for {_MAX_SILENT_TICKS * _TICK_S:g} s")

    async def _watch(self, monitor: AsyncSocket) -> None:
        """Raises TransferError when the connection is lost, or was never made."""
        end = await connection_loss(monitor)
        raise TransferError(f"the connection to {self._peer} at {self._endpoint} {end}")


async def _receive(socket: FrameSocket, peer: str) -> pb.TransferFrame:
    parts = await socket.receive()
    try:
        return pb.TransferFrame.FromString(parts[0].bytes)
    except DecodeError:
        raise TransferError(f"{peer} sent something that is no transfer frame") from None
