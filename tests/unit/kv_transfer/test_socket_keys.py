"""KV sockets with keys: members get through, strangers do not, on either side, and both sides say why."""

from __future__ import annotations

import asyncio
import logging
import socket as net

import pytest

from kv_transfer.sockets import SocketKeys
from segue.cluster_secret import ClusterSecret
from segue.errors import TransferError

KEYS, OTHER = SocketKeys.of(ClusterSecret("s" * 32)), SocketKeys.of(ClusterSecret("t" * 32))


def test_keys_are_not_shown():
    assert KEYS.receiver_secret.decode() not in repr(KEYS)
    assert KEYS.receiver_public.decode() not in repr(KEYS)


async def test_members_transfer_over_every_transport(pair, transport):
    receiver = await pair.receiver(keys=KEYS)
    sender = await pair.sender(keys=SocketKeys.of(ClusterSecret("s" * 32)), transports=(transport,))
    incoming = receiver.expect(0, [5, 9])
    push = await sender.open(incoming.ticket)
    for layer in range(pair.layout.num_layers):
        push.send(layer, [2, 3], range(2))
    committing = asyncio.create_task(push.commit(1))
    assert (await incoming.arrival()).transport == transport
    incoming.accept()
    await committing
    pair.assert_equal([2, 3], [5, 9])


@pytest.mark.parametrize(("receiving", "sending"), [(KEYS, OTHER), (KEYS, None), (None, KEYS)], ids=["other", "none", "only"])
async def test_a_stranger_is_refused_at_once_and_both_sides_name_the_setting(pair, receiving, sending, caplog):
    logged = asyncio.Event()
    caplog.handler.addFilter(lambda record: logged.set() or True)
    receiver = await pair.receiver(keys=receiving)
    sender = await pair.sender(keys=sending, transports=("tcp",))
    incoming = receiver.expect(0, [5])
    with caplog.at_level(logging.WARNING), pytest.raises(TransferError, match="SEGUE_CLUSTER_SECRET"):
        await sender.open(incoming.ticket)
    assert receiver.num_bad_frames == 0
    if receiving is not None:
        async with asyncio.timeout(10):
            await logged.wait()
        assert "SEGUE_CLUSTER_SECRET" in caplog.text


async def test_who_has_no_key_cannot_make_a_worker_allocate(pair):
    """A peer that says it will send a message of 2^62 bytes is cut off before anything is set aside for it."""
    receiver = await pair.receiver(keys=KEYS)
    host, _, port = receiver.endpoint.removeprefix("tcp://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), family=net.AF_INET)
    # ZMTP 3.1's greeting with CURVE, then a command frame of 8 bytes of length.
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    writer.write(greeting + b"\x06" + (2**62).to_bytes(8, "big") + bytes(1000))
    async with asyncio.timeout(10):
        # Its own greeting of 64 bytes at most, and the end.
        answer = await reader.read()
    writer.close()
    assert len(answer) <= 64
    assert receiver.num_bad_frames == 0
