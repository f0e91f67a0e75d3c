"""The two ends of a transfer connection: ZeroMQ sockets that neither wait for ever nor grow without bound, and that with a
cluster secret talk to members alone."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import socket as net
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from kv_transfer.transports import MAX_PUSH_BYTES
from segue.cluster_secret import SETTING, ClusterSecret
from segue.errors import ConfigError, TransferRefused

logger = logging.getLogger(__name__)

# A connection on which nothing was acknowledged for so long is lost. The kernel sees to that: it is about hosts and networks,
# not about processes. ZeroMQ's own heartbeats end the process when a connection breaks while its input waits for the
# application (an assertion in libzmq 4.3.5).
_UNACKNOWLEDGED_MS = 2_500
# On a connection that says nothing.
_KEEPALIVE_S = 10
# When the queues are full the writer waits.
_QUEUED_MESSAGES = 4
_MAX_CONTROL_BYTES = 2**16
# Of glibc's mallopt(3), and what they are set to: frames are to come out of memory that the process keeps for them.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_HEAP_FRAME_BYTES = 2 * MAX_PUSH_BYTES
_KEPT_BYTES = 2**26
# What was queued when a socket is closed has this long to leave.
_LAST_WORDS_MS = 200
# As plain numbers: arithmetic with the enums that they are takes longer than the calls they are for.
_NOBLOCK, _POLLIN, _POLLOUT, _EVENTS = int(zmq.NOBLOCK), int(zmq.POLLIN), int(zmq.POLLOUT), int(zmq.EVENTS)
_HANDSHAKE_FAILED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_LOSS_EVENTS = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | _HANDSHAKE_FAILED
# Strangers may knock as often as they like; the log is not for them to fill.
_REFUSAL_LOG_S = 60.0


@dataclass(frozen=True, slots=True)
class SocketKeys:
    """CURVE (CurveZMQ, ZeroMQ RFC 26): encryption and authentication, fresh keys for each connection.

    All receivers of a cluster have one key pair, made from its secret. The public half is a secret as well: nothing ever sends
    it, and a connection begins with a box that only who knows it can make. So both sides know each other for members, and no
    list of clients' keys has to be kept.
    """

    # In Z85, as ZeroMQ takes them.
    receiver_secret: bytes = field(repr=False)
    receiver_public: bytes = field(repr=False)

    @classmethod
    def of(cls, secret: ClusterSecret) -> SocketKeys:
        receiver_secret = z85.encode(secret.key("kv sockets"))
        return cls(receiver_secret, zmq.curve_public(receiver_secret))

    def protect_receiver(self, socket: zmq.SyncSocket) -> None:
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.receiver_secret)

    def protect_sender(self, socket: zmq.SyncSocket) -> None:
        public, secret = zmq.curve_keypair()
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.receiver_public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)


class AsyncSocket:
    """A ZeroMQ socket on the running event loop, for one reader and one writer. pyzmq's own such class spends several times as
    long on each message, which is most of what a small push costs."""

    def __init__(self, socket: zmq.SyncSocket) -> None:
        """Takes `socket` over."""
        self._socket = socket
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._readable, self._writable = asyncio.Event(), asyncio.Event()
        self._loop.add_reader(self._fd, self._look)
        self._refusals: tuple[AsyncSocket, asyncio.Task[None]] | None = None

    async def receive(self) -> list[zmq.Frame]:
        while True:
            try:
                parts = self._socket.recv_multipart(_NOBLOCK, copy=False)
            except zmq.Again:
                await self._until(self._readable)
            else:
                self._look()
                return parts

    async def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Waits while the queue is full. Memory that is sent must not change until it left."""
        while True:
            try:
                return self.send_now(parts)
            except zmq.Again:
                await self._until(self._writable)

    def send_now(self, parts: Sequence[bytes | memoryview]) -> None:
        """Raises zmq.ZMQError when that cannot be without waiting, or not at all."""
        try:
            self._socket.send_multipart(parts, _NOBLOCK, copy=False)
        finally:
            self._look()

    async def _until(self, event: asyncio.Event) -> None:
        """After a call that could not be served. Looks once more when the event is cleared: the call may have taken away the
        word that either side of the socket waits for, and what has changed since would be missed."""
        event.clear()
        self._look()
        await event.wait()

    def log_refusals(self) -> None:
        """Says from now on, on a listening socket, that peers without the right keys were turned away."""
        monitor = AsyncSocket(self._socket.get_monitor_socket(_HANDSHAKE_FAILED))
        self._refusals = monitor, asyncio.create_task(_log_refusals(monitor))

    def close(self, linger_ms: int = 0) -> None:
        if self._refusals is not None:
            monitor, task = self._refusals
            task.cancel()
            self._socket.disable_monitor()
            monitor.close()
        self._loop.remove_reader(self._fd)
        self._socket.close(linger_ms)

    def _look(self) -> None:
        """The descriptor tells once that something has changed, and whatever uses the socket may take that word away: so this
        follows each use."""
        events = int(self._socket.getsockopt(_EVENTS))
        if events & _POLLIN:
            self._readable.set()
        if events & _POLLOUT:
            self._writable.set()


async def bind_receiver(
    context: zmq.SyncContext, host: str, region_bytes: int, port: int = 0, keys: SocketKeys | None = None
) -> tuple[AsyncSocket, str]:
    """A ROUTER and its endpoint; the system picks a port where none is given. Raises ConfigError when `host` is no address of
    this host, or when the port is taken."""
    socket = context.socket(zmq.ROUTER)
    _set_common(socket)
    if keys is not None:
        keys.protect_receiver(socket)
    # Sending to a peer that went away is then an error, which is how its loss is noticed.
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.RCVHWM, _QUEUED_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, max(MAX_PUSH_BYTES, region_bytes, _MAX_CONTROL_BYTES))
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=net.SOCK_STREAM)
        address = str(found[0][4][0])
        is_v6 = found[0][0] == net.AF_INET6
        socket.setsockopt(zmq.IPV6, int(is_v6))
        socket.bind(f"tcp://{f'[{address}]' if is_v6 else address}:{port or '*'}")
    except (net.gaierror, zmq.ZMQError) as error:
        socket.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"kv_port: port {port} is in use on {host}; give another one, or 0 for any free one") from None
        raise ConfigError(f"host: cannot listen on {host}: {error}; give an address of this machine") from None
    receiver = AsyncSocket(socket)
    if keys is not None:
        receiver.log_refusals()
    return receiver, socket.getsockopt_string(zmq.LAST_ENDPOINT)


def keep_frame_memory() -> None:
    """Lets this process keep the memory of frames that it received for those to come.

    ZeroMQ gets memory for each frame. What it frees goes back to the kernel, if glibc has its way, and each page is then mapped
    and cleared anew, which takes as long as copying into it. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _HEAP_FRAME_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


@contextmanager
def connected_sender(
    context: zmq.SyncContext, endpoint: str, keys: SocketKeys | None = None
) -> Iterator[tuple[AsyncSocket, AsyncSocket]]:
    """A DEALER on its way to `endpoint`, and the socket that tells what becomes of its connection (`connection_loss`).

    It never reconnects: a new connection would reach a receiver that does not know it, perhaps one of another epoch. Raises
    TransferRefused when `endpoint` is none.
    """
    if not endpoint.startswith("tcp://"):
        raise TransferRefused(f"{endpoint!r} is no tcp:// endpoint")
    socket = context.socket(zmq.DEALER)
    _set_common(socket)
    if keys is not None:
        keys.protect_sender(socket)
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    socket.setsockopt(zmq.SNDHWM, _QUEUED_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, _MAX_CONTROL_BYTES)
    socket.setsockopt(zmq.IPV6, int(endpoint.startswith("tcp://[")))
    connection, monitor = AsyncSocket(socket), AsyncSocket(socket.get_monitor_socket(_LOSS_EVENTS))
    try:
        socket.connect(endpoint)
        yield connection, monitor
    except zmq.ZMQError as error:
        raise TransferRefused(f"cannot connect to {endpoint!r}: {error}") from None
    finally:
        socket.disable_monitor()
        monitor.close()
        connection.close(_LAST_WORDS_MS)


async def connection_loss(monitor: AsyncSocket) -> str:
    """Returns when the monitored connection is lost, or could not be made: what became of it."""
    event = await _next_event(monitor)
    while not event & _LOSS_EVENTS:
        event = await _next_event(monitor)
    if event & _HANDSHAKE_FAILED:
        return f"was refused while it was made: do both processes have the same {SETTING}, or both none?"
    return "was lost"


async def _next_event(monitor: AsyncSocket) -> int:
    return int(parse_monitor_message([part.bytes for part in await monitor.receive()])["event"])


async def _log_refusals(monitor: AsyncSocket) -> None:
    loop, logged_s = asyncio.get_running_loop(), float("-inf")
    while True:
        await _next_event(monitor)
        if loop.time() - logged_s > _REFUSAL_LOG_S:
            logged_s = loop.time()
            logger.warning("turned away a KV connection of a process that has another %s, or none", SETTING)


def _set_common(socket: zmq.SyncSocket) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.TCP_MAXRT, _UNACKNOWLEDGED_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_S)
