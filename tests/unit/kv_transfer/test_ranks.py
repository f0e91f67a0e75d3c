"""A rank's tickets and pushes, used from rank 0: the same as one's own, and gone with the rank."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
import zmq.asyncio

from kv_transfer.handover import HandOver, Reservation
from kv_transfer.identity import WorkerIdentity
from kv_transfer.memory import KVMemory
from kv_transfer.rank_server import RankServer
from kv_transfer.ranks import RankedReceiver, RankedSender, RemoteRank
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from segue.errors import TransferError, TransferRefused, WorkerLost
from segue.kv_layout import KVLayout
from segue.v1 import ranks_pb2 as pb

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=8, block_size=4, dtype="float32", model_revision="test", num_ranks=2)
HOST = "127.0.0.1"


class TwoRanks:
    """A worker of two ranks, the second of which is reached through its server, and what its services would have."""

    def __init__(self, stack: AsyncExitStack, name: str) -> None:
        self._stack = stack
        self._name = name
        self.memories: list[KVMemory] = []

    async def start(self) -> None:
        enter, ends = self._stack.enter_async_context, []
        for rank in range(2):
            memory = self._stack.enter_context(KVMemory.allocate(replace(LAYOUT, rank=rank), 16))
            self.memories.append(memory)
            identity = WorkerIdentity(f"{self._name}/{rank}", 1, LAYOUT.fingerprint())
            ends.append((await enter(KVReceiver(identity, memory, host=HOST)), await enter(KVSender(identity, memory))))
        self.server = await enter(RankServer(*ends[1], HOST))
        self.remote = RemoteRank(await enter(self._context()), 1, self.server.endpoint)
        self.serving, self.running = asyncio.create_task(self.server.run()), asyncio.create_task(self.remote.run())
        self._stack.push_async_callback(self._stop)
        self.receiver = RankedReceiver(ends[0][0], [self.remote])
        self.sender = RankedSender(ends[0][1], [self.remote])

    async def _stop(self) -> None:
        for task in (self.serving, self.running):
            task.cancel()
        await asyncio.gather(self.serving, self.running, return_exceptions=True)

    @staticmethod
    @asynccontextmanager
    async def _context() -> AsyncIterator[zmq.SyncContext]:
        with zmq.Context() as context:
            yield context


@pytest.fixture
async def workers() -> AsyncIterator[tuple[TwoRanks, TwoRanks]]:
    """Prefill and decode."""
    async with AsyncExitStack() as stack:
        prefill, decode = TwoRanks(stack, "prefill"), TwoRanks(stack, "decode")
        await prefill.start()
        await decode.start()
        for number, memory in enumerate(prefill.memories):
            np.frombuffer(memory.buffer, np.uint8)[:] = np.random.default_rng(number).integers(0, 256, memory.num_bytes)
        yield prefill, decode


async def test_every_rank_sends_its_own_kv(workers):
    prefill, decode = workers
    reservation = await Reservation.of(decode.receiver, 1, [9, 4], 2)
    assert [list(ticket.block_ids) for ticket in reservation.tickets] == [[9, 4]] * 2
    hand_over = await HandOver.open(prefill.sender, reservation.tickets)
    for layer in range(2):
        hand_over.send(layer, [3, 7, 1], range(1, 3))
    committing = asyncio.create_task(hand_over.commit(42, [3, 7, 1]))
    arrival = await reservation.arrival()
    assert (arrival.first_token, arrival.num_bytes, arrival.transport) == (42, 2 * 2 * 2 * LAYOUT.region_bytes, "shm")
    reservation.accept()
    assert await committing == arrival.num_bytes
    for source, target in zip(prefill.memories, decode.memories, strict=True):
        for layer in range(2):
            assert target.region(layer, 9) == source.region(layer, 7)
            assert target.region(layer, 4) == source.region(layer, 1)
    await hand_over.abandon("the leg ended")
    await reservation.fence()
    await reservation.fence()
    assert prefill.server.num_held == decode.server.num_held == 0


async def test_errors_come_through_as_what_they_are(workers):
    prefill, decode = workers
    with pytest.raises(TransferRefused, match="cannot be shared out over 3 ranks"):
        await Reservation.of(decode.receiver, 0, [1], 3)
    reservation = await Reservation.of(decode.receiver, 0, [1], 2)
    tickets = reservation.tickets
    tickets[1].decode_epoch += 1
    with pytest.raises(TransferRefused, match="epoch"):
        await HandOver.open(prefill.sender, tickets)
    tickets[1].writer_rank = 2
    with pytest.raises(TransferRefused, match="rank 2 of 2"):
        await HandOver.open(prefill.sender, tickets)
    arrival = asyncio.create_task(reservation._parts[1].arrival())
    await asyncio.sleep(0)
    await reservation.fence()
    with pytest.raises(TransferRefused, match="taken back"):
        await arrival


async def test_a_push_that_is_abandoned_ends_on_its_rank(workers):
    prefill, decode = workers
    reservation = await Reservation.of(decode.receiver, 0, [1], 2)
    hand_over = await HandOver.open(prefill.sender, reservation.tickets)
    committing = asyncio.create_task(hand_over.commit(1, ()))  # regions are missing
    with pytest.raises(TransferError, match="missing"):
        await committing
    await hand_over.abandon("it failed")
    assert prefill.server.num_held == 0
    await reservation.fence()


async def test_opening_may_be_given_up(workers):
    prefill, decode = workers
    # At an endpoint that takes connections and never answers.
    reservation = await Reservation.of(decode.receiver, 0, [1], 2)
    (_, ticket) = reservation.tickets
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as silent:
        silent.bind(f"tcp://{HOST}:*")
        ticket.endpoint = silent.getsockopt_string(zmq.LAST_ENDPOINT)
        opening = asyncio.create_task(prefill.sender.open(ticket))
        await silent.recv_multipart()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        # Requests are taken in order: this one comes after the abandoning.
        for part in await prefill.remote.reserve(0, [1], 2):
            await part.fence()
        assert prefill.server.num_held == 0
    await reservation.fence()


async def test_a_reservation_that_is_given_up_leaves_nothing(workers):
    _, decode = workers
    reserving = asyncio.create_task(Reservation.of(decode.receiver, 0, [1, 2], 2))
    await asyncio.sleep(0)
    reserving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reserving
    assert decode.server.num_held == 0
    assert not decode.receiver._own._tickets


async def test_a_reservation_that_is_given_up_and_refused_leaves_no_unheard_error(workers, unheard_errors):
    _, decode = workers
    reserving = asyncio.create_task(Reservation.of(decode.receiver, 0, [1], 3))
    await asyncio.sleep(0)
    reserving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reserving
    assert not unheard_errors()


async def test_a_rank_that_is_gone_ends_what_waits_for_it(workers):
    _, decode = workers
    reservation = await Reservation.of(decode.receiver, 0, [1], 2)
    arrival = asyncio.create_task(reservation.arrival())
    await asyncio.sleep(0)
    decode.server._context.destroy(linger=0)
    with pytest.raises(WorkerLost, match="rank 1 of this worker"):
        await decode.running
    with pytest.raises(WorkerLost):
        await arrival
    with pytest.raises(WorkerLost):
        await Reservation.of(decode.receiver, 0, [2], 2)


async def test_what_is_no_request_is_dropped_and_a_defect_ends_the_rank(workers):
    _, decode = workers
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(decode.server.endpoint)
        await stranger.send(b"\xff\xff")
        await decode.remote.reserve(0, [1], 2)
        arrival = pb.RankRequest(request_id=1, arrival=pb.IncomingName(ticket_id=99))
        await stranger.send(arrival.SerializeToString())
        with pytest.raises(ExceptionGroup, match="TaskGroup"):
            await decode.serving
