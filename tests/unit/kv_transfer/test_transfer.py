"""Transfers that go well, through real sockets and real shared memory."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from typing import Any

import pytest

from kv_transfer.protocol import ReceivingTicket
from segue.v1 import transfer_pb2 as pb

_UVLOOP_PROGRAM = """
import asyncio, uvloop
from kv_transfer.identity import WorkerIdentity
from kv_transfer.memory import KVMemory
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from segue.kv_layout import KVLayout

layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32", model_revision="test")

async def transfer(transport):
    with KVMemory.allocate(layout, 8) as source, KVMemory.allocate(layout, 8) as target:
        source.buffer[:] = bytes(range(256)) * (len(source.buffer) // 256)
        decode, prefill = (WorkerIdentity(name, 1, layout.fingerprint()) for name in ("decode", "prefill"))
        async with KVReceiver(decode, target, host="127.0.0.1") as receiver:
            async with KVSender(prefill, source, transports=(transport,)) as sender:
                incoming = receiver.expect(0, [5, 1])
                push = await sender.open(incoming.ticket)
                for layer in range(2):
                    push.send(layer, [2, 3], range(2))
                committing = asyncio.create_task(push.commit(42))
                assert (await incoming.arrival()).first_token == 42
                incoming.accept()
                assert await committing == 4 * layout.region_bytes
                assert target.region(1, 1) == source.region(1, 3)

for transport in ("shm", "tcp"):
    uvloop.run(transfer(transport))
print("done")
"""


async def hand_over(incoming: Any, push: Any, sources: list[int], num_layers: int, first_token: int = 42) -> int:
    """Pushes `sources` to the ticket's blocks in order, one by one at random, and takes them over."""
    first_block = push.ticket.first_block
    jobs = [(layer, first_block + index) for layer in range(num_layers) for index in range(len(sources))]
    random.Random(first_token).shuffle(jobs)
    for number, (layer, block) in enumerate(jobs):
        push.send(layer, [0] * first_block + sources, range(block, block + 1))
        if number % 5 == 0:
            await asyncio.sleep(0)
    committing = asyncio.create_task(push.commit(first_token))
    arrival = await incoming.arrival()
    assert arrival.first_token == first_token
    assert arrival.source_blocks is None
    assert not committing.done()
    incoming.accept()
    num_bytes = await committing
    assert num_bytes == arrival.num_bytes
    await incoming.fence()
    return num_bytes


async def test_regions_arrive_where_the_ticket_says(pair, transport):
    receiver, sender = await pair.receiver(), await pair.sender(transports=(transport,))
    incoming = receiver.expect(0, [9, 3, 4, 30])
    push = await sender.open(incoming.ticket)
    assert push.transport == transport
    for layer in range(pair.layout.num_layers):
        push.send(layer, [5, 6, 7, 1], range(4))
    committing = asyncio.create_task(push.commit(42))
    arrival = await incoming.arrival()
    assert (arrival.first_token, arrival.transport) == (42, transport)
    pair.assert_equal([5, 6, 7, 1], [9, 3, 4, 30])
    pair.assert_untouched(except_blocks=[9, 3, 4, 30])
    incoming.accept()
    assert await committing == arrival.num_bytes == receiver.num_bytes_received == 4 * pair.layout.block_bytes
    await incoming.fence()
    assert receiver.num_failed == receiver.num_bad_frames == 0


async def test_transports_are_chosen_when_the_pair_meets(pair):
    receiver, anywhere = await pair.receiver(), await pair.sender()
    assert (await anywhere.open(receiver.expect(0, [1]).ticket)).transport == "shm"
    tcp_receiver = await pair.receiver(transports=("tcp",))
    assert (await anywhere.open(tcp_receiver.expect(0, [1]).ticket)).transport == "tcp"


async def test_shared_memory_that_cannot_be_opened_is_done_without(pair, monkeypatch):
    receiver, sender = await pair.receiver(), await pair.sender()
    hidden = pair.target.segment
    hidden.fd = 999_999
    monkeypatch.setattr(type(pair.target), "segment", property(lambda memory: hidden))
    incoming = receiver.expect(0, [3])
    push = await sender.open(incoming.ticket)
    assert push.transport == "tcp"
    await hand_over(incoming, push, [8], pair.layout.num_layers)
    pair.assert_equal([8], [3])


async def test_only_the_delta_travels(pair, transport):
    receiver, sender = await pair.receiver(), await pair.sender(transports=(transport,))
    incoming = receiver.expect(first_block=6, block_ids=[2, 5])
    assert incoming.ticket.first_block == 6
    push = await sender.open(incoming.ticket)
    assert await hand_over(incoming, push, [10, 11], pair.layout.num_layers) == 2 * pair.layout.block_bytes
    pair.assert_equal([10, 11], [2, 5])


async def test_with_nothing_missing_only_a_commit_travels(pair, transport):
    receiver, sender = await pair.receiver(), await pair.sender(transports=(transport,))
    incoming = receiver.expect(first_block=8, block_ids=[])
    push = await sender.open(incoming.ticket)
    assert await hand_over(incoming, push, [], pair.layout.num_layers) == 0


async def test_many_tickets_share_a_connection_without_mixing(pair, transport):
    receiver, sender = await pair.receiver(), await pair.sender(transports=(transport,))
    blocks = list(range(pair.target.num_blocks))
    random.Random(1).shuffle(blocks)
    jobs = []
    for number in range(16):
        sources, targets = [number, number + 8], blocks[2 * number : 2 * number + 2]
        incoming = receiver.expect(0, targets)
        push = await sender.open(incoming.ticket)
        jobs.append((incoming, push, sources, targets))
    async with asyncio.TaskGroup() as group:
        for number, (incoming, push, sources, _) in enumerate(jobs):
            group.create_task(hand_over(incoming, push, sources, pair.layout.num_layers, first_token=number))
    for _, _, sources, targets in jobs:
        pair.assert_equal(sources, targets)
    assert receiver.num_failed == 0


async def test_send_may_be_called_from_another_thread(pair, transport):
    receiver, sender = await pair.receiver(), await pair.sender(transports=(transport,))
    incoming = receiver.expect(0, [9, 3])
    push = await sender.open(incoming.ticket)

    def compute() -> None:
        for layer in range(pair.layout.num_layers):
            push.send(layer, [0, 1], range(2))

    await asyncio.to_thread(compute)
    committing = asyncio.create_task(push.commit(1))
    await incoming.arrival()
    pair.assert_equal([0, 1], [9, 3])
    incoming.accept()
    await committing


async def test_within_one_process_blocks_stay_where_they_are(pair):
    receiver = await pair.receiver()
    sender = await pair.sender(local=receiver)
    incoming = receiver.expect_local()
    assert incoming.ticket.endpoint == "local:"
    push = await sender.open(incoming.ticket)
    assert push.transport == "local"
    push.send(0, [4, 5], range(2))
    committing = asyncio.create_task(push.commit(7, [4, 5]))
    arrival = await incoming.arrival()
    assert (arrival.first_token, arrival.num_bytes, arrival.source_blocks) == (7, 0, (4, 5))
    assert not committing.done()
    incoming.accept()
    assert await committing == 0
    await incoming.fence()


async def test_source_blocks_never_leave_their_process(pair, transport):
    receiver, sender = await pair.receiver(), await pair.sender(transports=(transport,))
    incoming = receiver.expect(0, [])
    push = await sender.open(incoming.ticket)
    committing = asyncio.create_task(push.commit(7, [4, 5]))
    assert (await incoming.arrival()).source_blocks is None
    assert incoming.state.source_blocks == ()
    incoming.accept()
    await committing


async def test_leases_are_renewed_while_a_push_is_open(pair, transport, monkeypatch):
    now_s = [0.0]
    renewed = asyncio.Event()
    honest = ReceivingTicket.renew

    def renew(state: ReceivingTicket, writer: object, at_s: float) -> Any:
        renewed.set()
        return honest(state, writer, at_s)

    monkeypatch.setattr(ReceivingTicket, "renew", renew)
    receiver = await pair.receiver(lease_ms=60, clock=lambda: now_s[0])
    sender = await pair.sender(transports=(transport,))
    incoming = receiver.expect(0, [1])
    push = await sender.open(incoming.ticket)
    for _ in range(5):
        now_s[0] += 0.05
        renewed.clear()
        await asyncio.wait_for(renewed.wait(), 30)
        assert incoming.state.heard_s == now_s[0]
    await hand_over(incoming, push, [2], pair.layout.num_layers)


async def test_tickets_name_different_blocks_of_the_memory(pair):
    receiver = await pair.receiver()
    for bad in ([1, 1], [pair.target.num_blocks], [-1]):
        with pytest.raises(ValueError, match="block_ids"):
            receiver.expect(0, bad)
    first, second = receiver.expect(0, [1]), receiver.expect(0, [2])
    assert first.ticket.ticket_id != second.ticket.ticket_id
    assert isinstance(first.ticket, pb.Ticket)


async def test_bad_sends_are_refused_at_once(pair, transport):
    receiver, sender = await pair.receiver(), await pair.sender(transports=(transport,))
    push = await sender.open(receiver.expect(0, [1]).ticket)
    bad_sends: list[tuple[int, list[int], range]] = [
        (3, [0], range(1)),
        (-1, [0], range(1)),
        (0, [24], range(1)),
        (0, [0, 1], range(1, 2)),
        (0, [0], range(-1, 1)),
        (0, [], range(1)),
    ]
    for layer, source_blocks, blocks in bad_sends:
        with pytest.raises(ValueError, match=r"layer|block"):
            push.send(layer, source_blocks, blocks)
    await push.abandon("done")
    with pytest.raises(ValueError, match="after commit"):
        push.send(0, [0], range(1))


def test_it_runs_on_uvloop():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _UVLOOP_PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("done\n", "")
