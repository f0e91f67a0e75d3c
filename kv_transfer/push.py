"""One transfer, seen from the prefill service: bytes go out while the prompt is still being computed.

`send` may be called from any thread. Parcels are brought over one by one, in the order of the calls: on the event loop,
one in each of its turns, or on the sender's transfer thread where it takes longer than the loop may stand still.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from threading import get_ident
from typing import Protocol

from kv_transfer.protocol import LOCAL, Failure, Frames, SendingTicket, SendPhase
from kv_transfer.transports import Parcel, Payload, PushWriter, RegionSource, is_quick, plan_parcels
from segue.errors import TransferError
from segue.v1 import transfer_pb2 as pb

Written = tuple[list[int], Payload]


class Connection(Protocol):
    """The way to one receiver."""

    transport: str

    def path_of(self, ticket: pb.Ticket) -> tuple[RegionSource, PushWriter] | None:
        """Where the ticket's bytes come from and what brings them over; None when nothing is to be written. Raises
        TransferRefused for a ticket that asks for what this worker has not."""

    def post(self, frame: pb.TransferFrame, payload: Payload = (), is_wanted: Callable[[], bool] | None = None) -> None:
        """Queues a frame. Just before it goes, `is_wanted` may still drop it."""

    def attach(self, push: Push) -> None:
        """Frames for the push's ticket go to it from now on, and its lease is renewed."""

    def forget(self, push: Push) -> None: ...


class Push:
    """Comes from `KVSender.open`; ends by `commit` or `abandon`."""

    def __init__(self, ticket: pb.Ticket, connection: Connection, thread: Executor) -> None:
        """Raises TransferRefused as `Connection.path_of`."""
        self.ticket = ticket
        # Set when the transfer failed from outside: the receiver revoked the ticket or is gone. `commit` says which.
        self.revoked = asyncio.Event()
        self._state = SendingTicket(ticket.ticket_id, ticket.decode_epoch)
        self._connection = connection
        self._path = connection.path_of(ticket)
        self._thread = thread
        self._loop = asyncio.get_running_loop()
        self._loop_thread = get_ident()
        # Parcels that are not begun, each with the prompt's blocks here.
        self._waiting: deque[tuple[Parcel, Sequence[int]]] = deque()
        # Not while parcels are written, as far as the event loop knows.
        self._is_quiet = asyncio.Event()
        self._is_quiet.set()
        self._block_ids = tuple(ticket.block_ids)
        self._opened = asyncio.Event()
        self._over = asyncio.Event()
        self._sealed = False
        # Once False, no further parcel is begun.
        self._may_write = True
        self._stopping: asyncio.Task[None] | None = None

    @property
    def transport(self) -> str:
        return self._connection.transport

    async def open(self) -> None:
        """Raises TransferRefused when the receiver does not honour the ticket. When cancelled, the ticket is given back."""
        self._connection.attach(self)
        for frame in self._state.open():
            self._connection.post(frame)
        try:
            await self._opened.wait()
        finally:
            if not self._opened.is_set():
                self._state.abandon("opening it was given up")
                self._begin_stop()
        if self._state.failure is not None:
            raise self._state.failure.error()

    def send(self, layer: int, source_blocks: Sequence[int], blocks: range) -> None:
        """Queues some of the prompt's `blocks` of one layer, numbered as the receiver cuts the prompt (see Ticket.block_size).

        The whole prompt lies in this worker's `source_blocks`, which must not change until the transfer ended, where its
        tokens are computed. Nothing happens once it failed. Raises ValueError for blocks that are not there or not wanted, or
        after `commit`.
        """
        first_block, ticket = self.ticket.first_block, self.ticket
        if self._sealed:
            raise ValueError(f"ticket {ticket.ticket_id}: send after commit")
        if self._path is None or not self._may_write:
            return
        memory = self._path[0].memory
        if not 0 <= layer < memory.layout.num_layers:
            raise ValueError(f"layer {layer} of {memory.layout.num_layers}")
        if not first_block <= blocks.start <= blocks.stop <= first_block + len(self._block_ids):
            raise ValueError(f"{blocks}: blocks from {first_block} on are wanted, {len(self._block_ids)} of them")
        if source_blocks and not 0 <= min(source_blocks) <= max(source_blocks) < memory.num_blocks:
            raise ValueError(f"source blocks beyond the {memory.num_blocks} of this worker")
        if (blocks.stop - 1) * ticket.block_size // memory.layout.block_size >= len(source_blocks):
            raise ValueError(f"{blocks}: beyond the {len(source_blocks)} source blocks")
        indices, placed = range(blocks.start - first_block, blocks.stop - first_block), tuple(source_blocks)
        parcels = plan_parcels(self.transport, layer, indices, self._block_ids, self._path[0].format.region_bytes)
        self._waiting.extend((parcel, placed) for parcel in parcels)
        if get_ident() == self._loop_thread:
            self._begin_writing()
        else:
            self._loop.call_soon_threadsafe(self._begin_writing)

    async def commit(self, first_token: int, source_blocks: Sequence[int] = ()) -> int:
        """Waits until everything is out and the receiver has taken it over. Returns the bytes that travelled.

        `source_blocks` are the prompt's blocks, which a receiver in this very process takes as they are. Raises the
        TransferError that ended the transfer instead.
        """
        self._sealed = True
        await self._flushed()
        for frame in self._state.commit(first_token, source_blocks if self.transport == LOCAL else ()):
            self._connection.post(frame)
        await self._over.wait()
        if self._state.failure is not None:
            raise self._state.failure.error()
        return self._state.num_bytes

    async def abandon(self, reason: str) -> bool:
        """Gives the transfer up. When it returns, nothing of it will be written any more. False when it had ended before."""
        was_over = self._state.is_over
        self._sealed = True
        if self._state.phase is not SendPhase.COMPLETE:
            self._state.abandon(reason)
            await asyncio.shield(self._begin_stop())
        return not was_over

    def reminder(self) -> Frames:
        """What to say again from time to time."""
        return self._state.reminder()

    def on_frame(self, frame: pb.TransferFrame) -> None:
        """What the receiver says of this ticket."""
        self._state.on_frame(frame)
        if frame.HasField("revoke"):
            self.revoked.set()
            self._begin_stop()
        elif self._state.phase is SendPhase.COMPLETE:
            self._over.set()
            self._connection.forget(self)
        elif frame.HasField("opened"):
            self._opened.set()

    def fail(self, failure: Failure) -> None:
        """The receiver is gone, or cannot be served."""
        if not self._state.is_over:
            self._state.fail(failure)
            self.revoked.set()
            self._begin_stop()

    async def stopped(self) -> None:
        """Waits for the last write of a push that failed or was abandoned."""
        if self._stopping is not None:
            await asyncio.shield(self._stopping)

    def _begin_stop(self) -> asyncio.Task[None]:
        self._may_write = False
        self._opened.set()
        self._over.set()
        if self._stopping is None:
            self._stopping = self._loop.create_task(self._stop())
        return self._stopping

    async def _stop(self) -> None:
        await self._flushed()
        for frame in self._state.writes_stopped():
            self._connection.post(frame)
        self._connection.forget(self)

    async def _flushed(self) -> None:
        """All writes have ended, and their frames are handed to the connection."""
        self._begin_writing()  # what another thread sent, if word of it is still on its way
        await self._is_quiet.wait()

    def _begin_writing(self) -> None:
        if self._waiting and self._is_quiet.is_set():
            self._is_quiet.clear()
            self._loop.call_soon(self._write_next)

    def _write_next(self) -> None:
        """Brings a parcel over. The next one has its turn after the frame of this one."""
        if self._path is None or not self._may_write or not self._waiting:
            self._waiting.clear()
            self._is_quiet.set()
            return
        parcel, source_blocks = self._waiting.popleft()
        source, writer = self._path
        if is_quick(self.transport, source.format, source.memory.layout):
            self._on_written(parcel, self._write(source, writer, parcel, source_blocks))
            return
        writing = self._loop.run_in_executor(self._thread, self._write, source, writer, parcel, source_blocks)
        writing.add_done_callback(lambda written: self._on_written(parcel, written.result()))

    def _write(
        self, source: RegionSource, writer: PushWriter, parcel: Parcel, source_blocks: Sequence[int]
    ) -> Written | Failure:
        """What came of it: on the event loop, or on the transfer thread."""
        try:
            first_block = self.ticket.first_block
            return writer.write(parcel, source.take(parcel.layer, source_blocks, [first_block + i for i in parcel.indices]))
        except Exception as error:  # noqa: BLE001  # whatever it is, the transfer ends with it
            return Failure(TransferError, f"ticket {self.ticket.ticket_id}: writing failed: {error!r}")

    def _on_written(self, parcel: Parcel, written: Written | Failure) -> None:
        if isinstance(written, Failure):
            self._state.abandon(written.reason)
            self.revoked.set()
            self._begin_stop()
        else:
            checksums, payload = written
            for frame in self._state.push(parcel.layer, parcel.indices, checksums):
                self._connection.post(frame, payload, lambda: self._state.phase is not SendPhase.FAILED)
        if self._waiting:
            self._loop.call_soon(self._write_next)
        else:
            self._is_quiet.set()
