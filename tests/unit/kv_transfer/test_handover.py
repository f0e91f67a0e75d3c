"""Hand-overs between workers of any tensor-parallel degrees, real senders and receivers, both transports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import numpy as np
import pytest

from kv_transfer.handover import HandOver, Reservation
from kv_transfer.identity import WorkerIdentity
from kv_transfer.memory import KVMemory
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from segue.errors import TransferError, TransferRefused
from segue.kv_layout import KVLayout

LAYOUT = KVLayout(num_layers=2, num_kv_heads=4, head_dim=8, block_size=4, dtype="float32", model_revision="test")
NUM_TOKENS = 22


def ranks_of(layout: KVLayout, num_ranks: int) -> list[KVLayout]:
    share = layout.total_kv_heads // num_ranks
    return [replace(layout, num_kv_heads=share, num_ranks=num_ranks, rank=rank) for rank in range(num_ranks)]


class Workers:
    """A prefill and a decode worker, each with some ranks, whose blocks lie in random order."""

    def __init__(self, stack: AsyncExitStack, transport: str) -> None:
        self._stack = stack
        self.transport = transport
        self.senders: list[KVSender] = []
        self.receivers: list[KVReceiver] = []
        self.sources: list[KVMemory] = []
        self.targets: list[KVMemory] = []

    async def start(self, prefill: KVLayout, prefill_ranks: int, decode: KVLayout, decode_ranks: int) -> None:
        random = np.random.default_rng(1)
        for layout in ranks_of(decode, decode_ranks):
            identity = WorkerIdentity(f"decode-0/{layout.rank}", 1, layout.fingerprint())
            memory = self._stack.enter_context(KVMemory.allocate(layout, 16))
            receiver = KVReceiver(identity, memory, host="127.0.0.1", transports=(self.transport,))
            self.receivers.append(await self._stack.enter_async_context(receiver))
            self.targets.append(memory)
        for layout in ranks_of(prefill, prefill_ranks):
            identity = WorkerIdentity(f"prefill-0/{layout.rank}", 1, layout.fingerprint())
            memory = self._stack.enter_context(KVMemory.allocate(layout, 16))
            np.frombuffer(memory.buffer, np.uint8)[:] = random.integers(0, 256, memory.num_bytes, np.uint8)
            sender = KVSender(identity, memory, transports=(self.transport,))
            self.senders.append(await self._stack.enter_async_context(sender))
            self.sources.append(memory)


def heads_of(memories: list[KVMemory], blocks: list[int], layer: int) -> list[bytes]:
    """For each KV head of the model, the bytes of its tokens' K and V."""
    found = []
    for memory in memories:
        layout = memory.layout
        numbers = memory.blocks(layer)[blocks].view(np.float32)
        for head in range(layout.num_kv_heads):
            keys = numbers[:, 0, head].reshape(-1, layout.head_dim, layout.block_size).transpose(0, 2, 1)
            values = numbers[:, 1, head].reshape(-1, layout.block_size, layout.head_dim)
            tokens = [part.reshape(-1, layout.head_dim)[:NUM_TOKENS].tobytes() for part in (keys, values)]
            found.append(b"".join(tokens))
    return found


@pytest.fixture(params=["shm", "tcp", "dist"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def workers(transport: str) -> AsyncIterator[Workers]:
    async with AsyncExitStack() as stack:
        yield Workers(stack, transport)


@pytest.mark.parametrize("block_sizes", [(4, 4), (4, 8), (8, 4)])
@pytest.mark.parametrize("decode_ranks", [1, 2, 4])
@pytest.mark.parametrize("prefill_ranks", [1, 2, 4])
async def test_every_rank_gets_its_heads_from_those_that_have_them(workers, prefill_ranks, decode_ranks, block_sizes):
    if workers.transport == "dist" and block_sizes[0] != block_sizes[1]:
        return  # refused, see below
    prefill, decode = (replace(LAYOUT, block_size=size) for size in block_sizes)
    await workers.start(prefill, prefill_ranks, decode, decode_ranks)
    source_blocks = [9, 3, 4, 15, 1, 0][: prefill.num_blocks_for(NUM_TOKENS)]
    target_blocks = [2, 14, 7, 8, 5, 11][: decode.num_blocks_for(NUM_TOKENS)]
    reservations = [await Reservation.of(receiver, 0, target_blocks, prefill_ranks) for receiver in workers.receivers]
    tickets = [ticket for reservation in reservations for ticket in reservation.tickets]
    assert len(tickets) == max(prefill_ranks, decode_ranks)
    committing = []
    for rank, sender in enumerate(workers.senders):
        hand_over = await HandOver.open(sender, [ticket for ticket in tickets if ticket.writer_rank == rank])
        for layer in range(prefill.num_layers):
            for block in range(len(target_blocks)):
                hand_over.send(layer, source_blocks, range(block, block + 1))
        committing.append(asyncio.create_task(hand_over.commit(7, ())))
    for reservation in reservations:
        assert (await reservation.arrival()).first_token == 7
        reservation.accept()
    travelled = sum(await asyncio.gather(*committing))
    assert travelled == len(target_blocks) * decode.block_bytes, "each head travels once"
    for layer in range(prefill.num_layers):
        sent = heads_of(workers.sources, source_blocks, layer)
        assert heads_of(workers.targets, target_blocks, layer) == sent
        assert len(set(sent)) == LAYOUT.num_kv_heads


async def test_a_hand_over_ends_as_one(workers):
    await workers.start(LAYOUT, 2, LAYOUT, 1)
    reservation = await Reservation.of(workers.receivers[0], 0, [1, 2], 2)
    first, second = [await HandOver.open(workers.senders[t.writer_rank], [t]) for t in reservation.tickets]
    for layer in range(LAYOUT.num_layers):
        first.send(layer, [0, 1], range(2))
    committing = asyncio.create_task(first.commit(1, ()))
    await second.abandon("its rank failed")
    with pytest.raises(TransferError, match="its rank failed"):
        await reservation.arrival()
    await reservation.fence()
    with pytest.raises(TransferError):
        await committing


async def test_what_was_opened_is_given_back_when_another_ticket_is_refused(workers):
    await workers.start(LAYOUT, 1, LAYOUT, 2)
    reservations = [await Reservation.of(receiver, 0, [1], 1) for receiver in workers.receivers]
    tickets = [reservation.tickets[0] for reservation in reservations]
    tickets[1].decode_epoch += 1
    with pytest.raises(TransferRefused, match="epoch"):
        await HandOver.open(workers.senders[0], tickets)
    # In shared memory this returns only when the writer has said that it writes nothing, or was never told that it may.
    for reservation in reservations:
        await reservation.fence()


async def test_heads_that_a_worker_has_not_are_refused(workers):
    await workers.start(LAYOUT, 2, LAYOUT, 1)
    reservation = await Reservation.of(workers.receivers[0], 0, [1], 2)
    with pytest.raises(TransferRefused, match="KV heads"):
        await HandOver.open(workers.senders[0], reservation.tickets[1:])
    with pytest.raises(TransferRefused, match="no ticket"):
        await HandOver.open(workers.senders[0], [])
    await reservation.fence()
    with pytest.raises(TransferRefused, match="cannot be shared out"):
        await Reservation.of(workers.receivers[0], 0, [1], 3)


@pytest.mark.parametrize("changes", [{"block_size": 8}, {"dtype": "bfloat16"}])
async def test_tensors_are_not_converted(workers, changes):
    if workers.transport != "dist":
        return
    await workers.start(LAYOUT, 1, replace(LAYOUT, **changes), 1)
    reservation = await Reservation.of(workers.receivers[0], 0, [1], 1)
    with pytest.raises(TransferRefused, match=r"kv_wire|equal block sizes"):
        await HandOver.open(workers.senders[0], reservation.tickets)
    await reservation.fence()
