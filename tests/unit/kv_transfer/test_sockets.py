"""ZeroMQ sockets on the event loop."""

from __future__ import annotations

import asyncio
import os
import platform
import socket as net
import subprocess
import sys
from collections.abc import Iterator

import pytest
import zmq

from kv_transfer.sockets import AsyncSocket, bind_receiver
from segue.errors import ConfigError

TIMEOUT_S = 30


@pytest.fixture
def context() -> Iterator[zmq.SyncContext]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


def connected(context: zmq.SyncContext, queued_messages: int) -> tuple[AsyncSocket, AsyncSocket]:
    left, right = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    for socket in (left, right):
        socket.setsockopt(zmq.SNDHWM, queued_messages)
        socket.setsockopt(zmq.RCVHWM, queued_messages)
    left.bind("inproc://pair")
    right.connect("inproc://pair")
    return AsyncSocket(left), AsyncSocket(right)


async def receive(socket: AsyncSocket) -> list[bytes]:
    return [part.bytes for part in await asyncio.wait_for(socket.receive(), TIMEOUT_S)]


async def test_a_sender_waits_while_the_queue_is_full_and_nothing_is_lost(context):
    left, right = connected(context, queued_messages=2)
    messages = [[b"head", str(number).encode()] for number in range(50)]
    num_sent = 0

    async def send_all() -> None:
        nonlocal num_sent
        for message in messages:
            await left.send(message)
            num_sent += 1

    sending = asyncio.create_task(send_all())
    assert await receive(right) == messages[0]
    assert num_sent < 20
    assert [await receive(right) for _ in messages[1:]] == messages[1:]
    await sending
    left.close()
    right.close()


async def test_what_came_in_while_others_used_the_socket_is_read(context):
    left, right = connected(context, queued_messages=100)
    for _ in range(100):
        reading = asyncio.create_task(receive(left))
        await asyncio.sleep(0)
        right.send_now([b"word"])
        # Looks at the socket's commands, and so takes away what would have woken the reader.
        left.send_now([b"other word"])
        assert await reading == [b"word"]
        assert await receive(right) == [b"other word"]
    left.close()
    right.close()


async def test_sending_now_does_not_wait(context):
    left, right = connected(context, queued_messages=1)

    def send_many() -> None:
        for _ in range(20):
            left.send_now([b"word"])

    with pytest.raises(zmq.Again):
        send_many()
    left.close()
    right.close()


async def test_a_receiver_listens_at_the_port_that_is_asked_for(context):
    with net.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"kv_port: port {port} is in use on 127.0.0.1"):
            await bind_receiver(context, "127.0.0.1", 0, port=port)
    receiver, endpoint = await bind_receiver(context, "127.0.0.1", 0, port=port)
    assert endpoint == f"tcp://127.0.0.1:{port}"
    receiver.close()


class SocketOfOneWord:
    """Its descriptor never says anything: the word that something has changed was taken by the very call that failed."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self.events = 0
        self.calls: list[str] = []

    def getsockopt(self, option: int) -> int:
        return self._read if option == zmq.FD else self.events

    def send_multipart(self, *_: object, **__: object) -> None:
        self._call("send", zmq.POLLOUT)

    def recv_multipart(self, *_: object, **__: object) -> list[object]:
        self._call("receive", zmq.POLLIN | zmq.POLLOUT)
        return []

    def _call(self, name: str, becomes: int) -> None:
        self.calls.append(name)
        if not self.events:
            self.events = becomes
            raise zmq.Again

    def close(self, _linger_ms: int) -> None:
        os.close(self._read)
        os.close(self._write)


@pytest.mark.parametrize("failing", ["send", "receive"])
async def test_what_changes_in_a_call_that_fails_is_not_missed(failing: str) -> None:
    fake = SocketOfOneWord()
    socket = AsyncSocket(fake)  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(10):
            await (socket.send([b"x"]) if failing == "send" else socket.receive())
        assert fake.calls == [failing, failing]
        assert socket._writable.is_set(), "whoever waits to send is told, whichever call it was"
    finally:
        socket.close()


FREED_AND_GOT_AGAIN = """
import ctypes, resource
from kv_transfer.sockets import keep_frame_memory
from kv_transfer.transports import MAX_PUSH_BYTES
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
keep_frame_memory()
def receive_frame():
    frame = libc.malloc(MAX_PUSH_BYTES)
    ctypes.memset(frame, 1, MAX_PUSH_BYTES)
    libc.free(frame)
receive_frame()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    receive_frame()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_the_memory_of_a_frame_serves_the_next_one():
    faults = subprocess.run([sys.executable, "-c", FREED_AND_GOT_AGAIN], check=True, capture_output=True, text=True).stdout
    assert int(faults) < 100, "of 8 x 1,024 pages"
