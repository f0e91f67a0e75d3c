"""The transport over torch.distributed, with gloo: what is particular to it. See also test_handover."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.distributed import Channel, DistWriter, tensor_checksums
from kv_transfer.identity import WorkerIdentity
from kv_transfer.push import Push
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.tensors import DeviceMemory
from segue.errors import ChecksumMismatch, TransferError
from segue.v1 import transfer_pb2 as pb

TIMEOUT_S = 60


async def connect(pair: Any) -> tuple[Any, Any]:
    return await pair.receiver(transports=("dist",)), await pair.sender(transports=("dist",))


def send_all(pair: Any, push: Push, sources: list[int]) -> None:
    for layer in range(pair.layout.num_layers):
        push.send(layer, sources, range(len(sources)))


async def assert_serves(pair: Any, receiver: Any, sender: Any) -> None:
    incoming = receiver.expect(0, [17, 4])
    push = await sender.open(incoming.ticket)
    send_all(pair, push, [3, 20])
    committing = asyncio.create_task(push.commit(5))
    assert (await incoming.arrival()).transport == "dist"
    incoming.accept()
    assert await committing == 2 * pair.layout.block_bytes
    pair.assert_equal([3, 20], [17, 4])


async def test_tickets_share_a_group(pair):
    receiver, sender = await connect(pair)
    for _ in range(3):
        await assert_serves(pair, receiver, sender)
    pair.assert_untouched([17, 4])


async def test_memory_of_a_device_is_handed_over(pair):
    """As a GPU's would be, whose place the host's takes here."""
    source, target = (DeviceMemory.allocate(pair.layout, 8, "cpu") for _ in range(2))
    source.tensor.copy_(torch.randint(0, 256, source.tensor.shape, dtype=torch.uint8))
    target.tensor.zero_()
    decode, prefill = (WorkerIdentity(name, 1, pair.layout.fingerprint()) for name in ("decode-0", "prefill-0"))
    async with KVReceiver(decode, target, host="127.0.0.1", transports=("dist",)) as receiver:
        async with KVSender(prefill, source, transports=("dist",)) as sender:
            incoming = receiver.expect(0, [6, 1])
            push = await sender.open(incoming.ticket)
            send_all(pair, push, [2, 5])
            committing = asyncio.create_task(push.commit(5))
            await incoming.arrival()
            incoming.accept()
            await committing
    sent, arrived = (memory.tensor.view(pair.layout.num_layers, 8, -1) for memory in (source, target))
    assert torch.equal(arrived[:, [6, 1]], sent[:, [2, 5]])
    assert not arrived[:, [0, 2, 3, 4, 5, 7]].any()


async def test_damage_is_noticed_and_ends_its_ticket_alone(pair, monkeypatch):
    receiver, sender = await connect(pair)
    honest = DistWriter.write

    def damaging(writer: DistWriter, parcel: Any, payload: list[torch.Tensor]) -> Any:
        checksums, payload = honest(writer, parcel, payload)
        payload[0][5] ^= 1
        return checksums, payload

    incoming = receiver.expect(0, [1])
    push = await sender.open(incoming.ticket)
    with monkeypatch.context() as patch:
        patch.setattr(DistWriter, "write", damaging)
        push.send(0, [0], range(1))
        with pytest.raises(ChecksumMismatch):
            await incoming.arrival()
    await incoming.fence()
    await push.abandon("it failed")
    await assert_serves(pair, receiver, sender)


async def test_what_was_announced_for_a_ticket_that_is_over_does_no_harm(pair):
    receiver, sender = await connect(pair)
    incoming = receiver.expect(0, [1, 2])
    push = await sender.open(incoming.ticket)
    send_all(pair, push, [0, 1])
    await incoming.fence()
    with pytest.raises(TransferError, match="taken back"):
        await push.commit(1)
    await assert_serves(pair, receiver, sender)


@pytest.mark.parametrize("num_bytes", [0, 2**40])
async def test_a_push_of_no_sensible_size_costs_its_sender_the_connection(pair, monkeypatch, num_bytes):
    receiver, sender = await connect(pair)
    incoming = receiver.expect(0, [1])
    push = await sender.open(incoming.ticket)
    connection = push._connection
    connection.post(pb.TransferFrame(push=pb.Push(ticket_id=1, num_bytes=num_bytes)))
    with pytest.raises(TransferError, match="lost"):
        await asyncio.wait_for(incoming.arrival(), TIMEOUT_S)
    await incoming.fence()


async def test_a_sender_that_goes_away_is_noticed_at_once(pair):
    receiver = await pair.receiver(transports=("dist",))
    identity = WorkerIdentity("prefill-0", 1, pair.layout.fingerprint())
    async with KVSender(identity, pair.source, transports=("dist",)) as sender:
        incoming = receiver.expect(0, [1])
        await sender.open(incoming.ticket)
    with pytest.raises(TransferError):
        await asyncio.wait_for(incoming.arrival(), TIMEOUT_S)


async def test_nobody_to_meet_is_an_error(monkeypatch):
    monkeypatch.setattr("kv_transfer.distributed._TIMEOUT", timedelta(seconds=0.1))
    with pytest.raises(TransferError, match="cannot meet"):
        await Channel.join_as_sender("tcp://127.0.0.1:1", pb.Rendezvous(port=1, name="x"), torch.device("cpu"))


@settings(deadline=None)
@given(st.integers(1, 100), st.integers(0, 2**31), st.data())
def test_checksums_tell_damaged_regions_from_sound_ones(region_bytes, seed, data):
    regions = torch.randint(0, 256, (3, region_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    sound = tensor_checksums(regions)
    assert all(0 <= checksum < 2**64 for checksum in sound)
    row, column = data.draw(st.integers(0, 2)), data.draw(st.integers(0, region_bytes - 1))
    regions[row, column] ^= data.draw(st.integers(1, 255))
    damaged = tensor_checksums(regions)
    assert [left != right for left, right in zip(sound, damaged, strict=True)] == [index == row for index in range(3)]


def test_swapped_words_are_noticed():
    regions = torch.arange(32, dtype=torch.uint8).view(1, 32)
    assert tensor_checksums(regions) != tensor_checksums(regions.view(4, 8).flip(0).reshape(1, 32))
