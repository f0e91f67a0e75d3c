"""Where faults enter the hand-over: between the sockets and the protocol, and behind the writer of bytes.

`Faults` lets everything pass as it is. `InjectedFaults` puts a layer of its own around sockets and writers, which does what a
segue.chaos.Chaos decides. The protocol on either side knows nothing of it, and without faults there is no layer.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket as net
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Protocol

import zmq
from google.protobuf.message import DecodeError

from kv_transfer.sockets import AsyncSocket
from kv_transfer.transports import Parcel, Payload, PushWriter
from segue.chaos import Chaos, Fate, Strike
from segue.errors import TransferError
from segue.v1 import transfer_pb2 as pb

logger = logging.getLogger(__name__)

# ZeroMQ writes on a thread of its own. A process that dies after it sent a frame stands still for as long as that may take.
_LEAVING_S = 0.02


class FrameSocket(Protocol):
    """What a connection needs of a ZeroMQ socket; see kv_transfer.sockets.AsyncSocket."""

    async def receive(self) -> list[zmq.Frame]: ...

    async def send(self, parts: Sequence[bytes | memoryview]) -> None: ...

    def send_now(self, parts: Sequence[bytes | memoryview]) -> None: ...

    def close(self, linger_ms: int = 0) -> None: ...


class Faults:
    """None at all."""

    def sending(self, socket: AsyncSocket) -> FrameSocket:
        """Stands for `socket`, a DEALER, which `send` is used of."""
        return socket

    def receiving(self, socket: AsyncSocket) -> FrameSocket:
        """Stands for `socket`, a ROUTER, which `send_now` is used of."""
        return socket

    def writer(self, writer: PushWriter) -> PushWriter:
        """Brings bytes to the peer in place of `writer`."""
        return writer

    def step(self, event: str) -> None:
        """A ticket of this receiver was granted, arrived or was accepted."""


NO_FAULTS = Faults()


class InjectedFaults(Faults):
    """`on_strike` does to the process what the chaos wants done."""

    def __init__(self, chaos: Chaos, on_strike: Callable[[Strike], None] | None = None) -> None:
        self._chaos = chaos
        self._on_strike = on_strike or strike_process

    def sending(self, socket: AsyncSocket) -> FrameSocket:
        return _FaultySender(socket, self._chaos, self._meet)

    def receiving(self, socket: AsyncSocket) -> FrameSocket:
        return _FaultyReceiver(socket, self._chaos, self._meet)

    def writer(self, writer: PushWriter) -> PushWriter:
        return _FaultyWriter(writer, self._chaos)

    def step(self, event: str) -> None:
        self._meet(self._chaos.next(event).before)

    def _meet(self, strike: Strike | None) -> None:
        if strike is not None:
            logger.warning("chaos: %s", strike)
            self._on_strike(strike)


def strike_process(strike: Strike) -> None:
    """Kills this process, or stops it until another wakes it."""
    pid = os.getpid()
    if strike.after:
        # ZeroMQ writes on a thread of its own: what was sent has left by then.
        time.sleep(_LEAVING_S)
    if strike.pause_s is None:
        os.kill(pid, signal.SIGKILL)
        return
    with subprocess.Popen(["/bin/sh", "-c", f"sleep {strike.pause_s:f}; kill -CONT {pid}"]):
        os.kill(pid, signal.SIGSTOP)


@dataclass(frozen=True, slots=True)
class _Wire:
    """The TCP connection that a frame came over. A file number alone may be another's by now."""

    fd: int
    peer: object

    @classmethod
    def of(cls, frame: zmq.Frame) -> _Wire:
        fd = int(frame.get(zmq.SRCFD))
        return cls(fd, _peer_of(fd))

    def cut(self) -> None:
        if self.peer is not None and _peer_of(self.fd) == self.peer:
            with suppress(OSError), net.socket(fileno=os.dup(self.fd)) as wire:
                wire.shutdown(net.SHUT_RDWR)


def _peer_of(fd: int) -> object:
    """The other end's address; None when `fd` is no connection (any more)."""
    with suppress(OSError), net.socket(fileno=os.dup(fd)) as wire:
        return wire.getpeername()
    return None


class _FaultySocket:
    """What both ends have in common."""

    # Where the frame itself is among the parts of a message.
    position: ClassVar[int]

    def __init__(self, socket: AsyncSocket, chaos: Chaos, meet: Callable[[Strike | None], None]) -> None:
        self._socket = socket
        self._chaos = chaos
        self._meet = meet
        # Of what was received last: it has been handled when the next frame is asked for.
        self._after_handling: Strike | None = None

    async def receive(self) -> list[zmq.Frame]:
        self._meet(self._after_handling)
        parts = await self._socket.receive()
        strikes = self._chaos.next(_kind(parts[self.position].bytes))
        self._meet(strikes.before)
        self._after_handling = strikes.after
        return parts

    async def send(self, parts: Sequence[bytes | memoryview]) -> None:
        await self._socket.send(parts)

    def send_now(self, parts: Sequence[bytes | memoryview]) -> None:
        self._socket.send_now(parts)

    def close(self, linger_ms: int = 0) -> None:
        self._socket.close(linger_ms)


class _FaultySender(_FaultySocket):
    """A DEALER: to cut its one connection is to end with a TransferError."""

    position = 0

    async def send(self, parts: Sequence[bytes | memoryview]) -> None:
        kind = _kind(parts[0])
        fate = self._chaos.fate(kind)
        if fate.delay_s:
            await asyncio.sleep(fate.delay_s)
        strikes = self._chaos.next(kind)
        self._meet(strikes.before)
        if fate.is_dropped:
            raise TransferError(f"chaos: the connection was cut in place of a frame, {kind}")
        await self._socket.send(parts)
        self._meet(strikes.after)
        if fate.is_cut:
            raise TransferError(f"chaos: the connection was cut after a frame, {kind}")


class _FaultyReceiver(_FaultySocket):
    """A ROUTER: cuts the TCP connection that a frame would go by, and goes on."""

    position = 1

    def __init__(self, socket: AsyncSocket, chaos: Chaos, meet: Callable[[Strike | None], None]) -> None:
        super().__init__(socket, chaos, meet)
        self._wires: dict[bytes, _Wire] = {}
        # Frames that wait, in the order in which they were sent, and the task that sends them.
        self._waiting: deque[tuple[Sequence[bytes | memoryview], Fate]] = deque()
        self._sending: asyncio.Task[None] | None = None
        # Connections that turned out to be gone when a frame that had waited was sent: the next one is told.
        self._gone: set[bytes] = set()

    async def receive(self) -> list[zmq.Frame]:
        parts = await super().receive()
        self._wires[parts[0].bytes] = _Wire.of(parts[-1])
        return parts

    def send_now(self, parts: Sequence[bytes | memoryview]) -> None:
        connection = bytes(parts[0])
        if connection in self._gone:
            self._gone.remove(connection)
            raise zmq.ZMQError(errno.EHOSTUNREACH)
        fate = self._chaos.fate(_kind(parts[1]))
        if not fate.delay_s and not self._waiting:
            self._pass_on(parts, fate)
            return
        self._waiting.append((parts, fate))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.get_running_loop().create_task(self._send_waiting())

    def close(self, linger_ms: int = 0) -> None:
        if self._sending is not None:
            self._sending.cancel()
        super().close(linger_ms)

    async def _send_waiting(self) -> None:
        while self._waiting:
            parts, fate = self._waiting[0]
            await asyncio.sleep(fate.delay_s)
            try:
                self._pass_on(parts, fate)
            except zmq.ZMQError:
                self._gone.add(bytes(parts[0]))
            self._waiting.popleft()

    def _pass_on(self, parts: Sequence[bytes | memoryview], fate: Fate) -> None:
        kind = _kind(parts[1])
        strikes = self._chaos.next(kind)
        self._meet(strikes.before)
        if not fate.is_dropped:
            self._socket.send_now(parts)
            self._meet(strikes.after)
        if (fate.is_dropped or fate.is_cut) and (wire := self._wires.pop(bytes(parts[0]), None)) is not None:
            logger.warning("chaos: a connection is cut %s a frame, %s", "in place of" if fate.is_dropped else "after", kind)
            wire.cut()


def _kind(frame: bytes | memoryview) -> str:
    """Of a frame as it is on the wire; empty for one that cannot be read, which the protocol deals with."""
    try:
        message = pb.TransferFrame.FromString(bytes(frame))
    except DecodeError:
        return ""
    return message.WhichOneof("message") or ""


@dataclass(frozen=True, slots=True)
class _FaultyWriter:
    """Damages regions after their checksums were made."""

    inner: PushWriter
    chaos: Chaos

    def write(self, parcel: Parcel, payload: list[memoryview]) -> tuple[list[int], Payload]:
        checksums, frames = self.inner.write(parcel, payload)
        region_bytes = sum(part.nbytes for part in payload) // len(parcel.indices)
        damaged = [self._pass_on(part, region_bytes) for part in payload]
        if all(part is whole for part, whole in zip(damaged, payload, strict=True)):
            return checksums, frames
        # Written over, or in place of, what the checksums were made of.
        return checksums, self.inner.write(parcel, damaged)[1]

    def _pass_on(self, part: memoryview, region_bytes: int) -> memoryview:
        """`part` itself may be this worker's own KV memory: only a copy is damaged."""
        bits = [self.chaos.damaged_bit(8 * region_bytes) for _ in range(0, part.nbytes, region_bytes)]
        if all(bit is None for bit in bits):
            return part
        damaged = bytearray(part)
        for region, bit in enumerate(bits):
            if bit is not None:
                logger.warning("chaos: bit %d of a region flipped", bit)
                damaged[region * region_bytes + bit // 8] ^= 1 << bit % 8
        return memoryview(damaged)
