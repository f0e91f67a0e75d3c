"""The two ends of a transfer connection: ZeroMQ sockets that neither wait for ever nor grow without bound."""

from __future__ import annotations

import asyncio
import socket as net
from collections.abc import Iterator
from contextlib import contextmanager

import zmq
import zmq.asyncio

from kv_transfer.transports import MAX_FRAME_BYTES
from segue.errors import ConfigError, TransferRefused

# A peer that says nothing for this long, though pinged, has lost its connection.
_HEARTBEAT_INTERVAL_MS = 500
_HEARTBEAT_TIMEOUT_MS = 2_000
# Pushes are cut so small that these queues hold a few MiB; when they are full the writer waits.
_QUEUED_MESSAGES = 16
_MAX_CONTROL_BYTES = 2**16
# What was queued when a socket is closed has this long to leave.
_LAST_WORDS_MS = 200
LOSS_EVENTS = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


async def bind_receiver(context: zmq.asyncio.Context, host: str, region_bytes: int) -> tuple[zmq.asyncio.Socket, str]:
    """A ROUTER on a port that the system picks, and its endpoint. Raises ConfigError when `host` is no address of this host."""
    socket = context.socket(zmq.ROUTER)
    _set_common(socket)
    # Sending to a peer that went away is then an error, which is how its loss is noticed.
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.RCVHWM, _QUEUED_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, max(MAX_FRAME_BYTES, region_bytes, _MAX_CONTROL_BYTES))
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=net.SOCK_STREAM)
        address = str(found[0][4][0])
        is_v6 = found[0][0] == net.AF_INET6
        socket.setsockopt(zmq.IPV6, int(is_v6))
        socket.bind(f"tcp://[{address}]:*" if is_v6 else f"tcp://{address}:*")
    except (net.gaierror, zmq.ZMQError) as error:
        socket.close()
        raise ConfigError(f"host: cannot listen on {host}: {error}; give an address of this machine") from None
    return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)


@contextmanager
def connected_sender(context: zmq.asyncio.Context, endpoint: str) -> Iterator[tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]]:
    """A DEALER on its way to `endpoint`, and the socket that tells what becomes of its connection (LOSS_EVENTS).

    It never reconnects: a new connection would reach a receiver that does not know it, perhaps one of another epoch. Raises
    TransferRefused when `endpoint` is none.
    """
    if not endpoint.startswith("tcp://"):
        raise TransferRefused(f"{endpoint!r} is no tcp:// endpoint")
    socket = context.socket(zmq.DEALER)
    _set_common(socket)
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    socket.setsockopt(zmq.SNDHWM, _QUEUED_MESSAGES)
    socket.setsockopt(zmq.MAXMSGSIZE, _MAX_CONTROL_BYTES)
    socket.setsockopt(zmq.IPV6, int(endpoint.startswith("tcp://[")))
    monitor = socket.get_monitor_socket(LOSS_EVENTS)
    try:
        socket.connect(endpoint)
        yield socket, monitor
    except zmq.ZMQError as error:
        raise TransferRefused(f"cannot connect to {endpoint!r}: {error}") from None
    finally:
        socket.disable_monitor()
        monitor.close(0)
        socket.close(_LAST_WORDS_MS)


def _set_common(socket: zmq.asyncio.Socket) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_INTERVAL_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
