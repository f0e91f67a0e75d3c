"""Transfers that go wrong: each ends in an error on both sides, and its blocks can be taken back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import zmq.asyncio

from kv_transfer import connections
from kv_transfer.identity import host_identity
from kv_transfer.pieces import Pieces, checksums
from kv_transfer.push import Push
from kv_transfer.sockets import bind_receiver
from kv_transfer.transports import ShmWriter, TcpWriter
from segue.errors import ChecksumMismatch, ConfigError, LeaseExpired, TransferError, TransferRefused
from segue.v1 import transfer_pb2 as pb

TIMEOUT_S = 30
# How a raw peer says that it stores its KV: as the workers of these tests do.
FORMAT = pb.KVFormat(dtype="float32", block_size=4, num_ranks=1)


class RawPeer:
    """Speaks to a receiver frame by frame, well or badly."""

    def __init__(self, socket: zmq.asyncio.Socket, fingerprint: str) -> None:
        self.socket = socket
        self._fingerprint = fingerprint

    async def send(self, payload: list[bytes] | None = None, **message: Any) -> None:
        await self.socket.send_multipart([pb.TransferFrame(**message).SerializeToString(), *(payload or [])])

    async def receive(self, kind: str) -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                frame = pb.TransferFrame.FromString((await self.socket.recv_multipart())[0])
                if frame.HasField(kind):
                    return getattr(frame, kind)

    async def greet(self, transports: tuple[str, ...] = ("tcp",), sender_id: int = 77, number: int = 1) -> pb.Welcome:
        hello = pb.Hello(
            worker_id="raw",
            layout_fingerprint=self._fingerprint,
            host=host_identity(),
            transports=transports,
            sender_id=sender_id,
            format=FORMAT,
            number=number,
        )
        await self.send(hello=hello)
        return await self.receive("welcome")

    async def open(self, ticket: pb.Ticket) -> None:
        await self.send(open=pb.Open(ticket_id=ticket.ticket_id, decode_epoch=ticket.decode_epoch))
        await self.receive("opened")


@contextlib.asynccontextmanager
async def raw_peer(pair: Any, endpoint: str) -> AsyncIterator[RawPeer]:
    context = zmq.asyncio.Context()
    try:
        socket = context.socket(zmq.DEALER)
        socket.connect(endpoint)
        yield RawPeer(socket, pair.layout.fingerprint())
    finally:
        context.destroy(linger=0)


async def assert_still_serves(pair: Any, receiver: Any) -> None:
    sender = await pair.sender(transports=("tcp",))
    incoming = receiver.expect(0, [31])
    push = await sender.open(incoming.ticket)
    for layer in range(pair.layout.num_layers):
        push.send(layer, [0], range(1))
    committing = asyncio.create_task(push.commit(1))
    await asyncio.wait_for(incoming.arrival(), TIMEOUT_S)
    incoming.accept()
    await committing
    pair.assert_equal([0], [31])


async def test_damaged_bytes_are_noticed(pair, transport, monkeypatch):
    receiver, sender = await pair.receiver(), await pair.sender(transports=(transport,))
    incoming = receiver.expect(0, [1, 2])
    push = await sender.open(incoming.ticket)
    honest = {"shm": ShmWriter, "tcp": TcpWriter}[transport].write

    def damaging(writer: Any, parcel: Any, regions: list[memoryview]) -> tuple[list[int], list[memoryview]]:
        checksums, payload = honest(writer, parcel, regions)
        if parcel.layer == 1 and transport == "shm":
            pair.target.region(1, 2)[5] ^= 1
        elif parcel.layer == 1:
            damaged = bytearray(payload[0])
            damaged[-1] ^= 1
            return checksums, [memoryview(damaged)]
        return checksums, payload

    monkeypatch.setattr({"shm": ShmWriter, "tcp": TcpWriter}[transport], "write", damaging)
    for layer in range(pair.layout.num_layers):
        push.send(layer, [0, 1], range(2))
    with pytest.raises(ChecksumMismatch, match="layer 1"):
        await push.commit(1)
    with pytest.raises(ChecksumMismatch, match="layer 1"):
        await incoming.arrival()
    await asyncio.wait_for(incoming.fence(), TIMEOUT_S)
    assert receiver.num_failed == 1


async def test_abandoning_ends_both_sides(pair, transport):
    receiver, sender = await pair.receiver(), await pair.sender(transports=(transport,))
    incoming = receiver.expect(0, [1])
    push = await sender.open(incoming.ticket)
    push.send(0, [0], range(1))
    assert await push.abandon("the client went away")
    assert not await push.abandon("again")
    with pytest.raises(TransferError, match="the client went away"):
        await incoming.arrival()
    with pytest.raises(TransferError, match="abandoned"):
        await push.commit(1)
    await asyncio.wait_for(incoming.fence(), TIMEOUT_S)


async def test_taking_back_ends_both_sides(pair, transport):
    receiver, sender = await pair.receiver(), await pair.sender(transports=(transport,))
    incoming = receiver.expect(0, [1])
    push = await sender.open(incoming.ticket)
    push.send(0, [0], range(1))
    await asyncio.wait_for(incoming.fence(), TIMEOUT_S)
    with pytest.raises(TransferRefused, match="taken back"):
        await incoming.arrival()
    await asyncio.wait_for(push.revoked.wait(), TIMEOUT_S)
    before = bytes(pair.target.buffer)
    push.send(1, [3], range(1))
    with pytest.raises(TransferRefused, match="taken back"):
        await push.commit(1)
    assert bytes(pair.target.buffer) == before
    assert not await push.abandon("too late")
    await incoming.fence()
    assert receiver.num_failed == 0


@pytest.mark.usefixtures("transfer_threads")
async def test_the_fence_waits_for_a_write_in_place_that_is_under_way(pair, monkeypatch):
    receiver, sender = await pair.receiver(), await pair.sender(transports=("shm",))
    incoming = receiver.expect(0, [1])
    push = await sender.open(incoming.ticket)
    loop, begun, may_go_on = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    honest = ShmWriter.write

    def slow(writer: Any, parcel: Any, regions: list[memoryview]) -> tuple[list[int], list[memoryview]]:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(may_go_on.wait(), loop).result(TIMEOUT_S)
        return honest(writer, parcel, regions)

    monkeypatch.setattr(ShmWriter, "write", slow)
    push.send(0, [0], range(1))
    push.send(1, [0], range(1))
    await begun.wait()
    fencing = asyncio.create_task(incoming.fence())
    abandoning = asyncio.create_task(push.abandon("cancelled"))
    await push.revoked.wait()
    assert not fencing.done()
    assert not abandoning.done()
    may_go_on.set()
    await asyncio.wait_for(asyncio.gather(fencing, abandoning), TIMEOUT_S)
    assert any(pair.target.region(0, 1))
    assert not any(pair.target.region(1, 1)), "a write was begun after the ticket was taken back"


@pytest.mark.parametrize("rounds", [25])
async def test_abandon_commit_and_fence_may_race(pair, transport, rounds):
    receiver, sender = await pair.receiver(), await pair.sender(transports=(transport,))
    for number in range(rounds):
        incoming = receiver.expect(0, [1, 2])
        push = await sender.open(incoming.ticket)
        for layer in range(pair.layout.num_layers):
            push.send(layer, [number % 20, 3], range(2))
        racers = [push.commit(1), incoming.arrival(), push.abandon("race"), incoming.fence()]
        order = [racers[(number + offset) % 4] for offset in range(4)]
        ends = await asyncio.wait_for(asyncio.gather(*order, return_exceptions=True), TIMEOUT_S)
        assert all(not isinstance(end, Exception) or isinstance(end, TransferError) for end in ends), ends
        await push.abandon("over")
        await asyncio.wait_for(incoming.fence(), TIMEOUT_S)
    await assert_still_serves(pair, receiver)


async def test_opening_may_be_cancelled(pair, transport):
    receiver, sender = await pair.receiver(), await pair.sender(transports=(transport,))
    await (await sender.open(receiver.expect(0, [0]).ticket)).abandon("only to connect")
    incoming = receiver.expect(0, [1])
    opening = asyncio.create_task(sender.open(incoming.ticket))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    with pytest.raises(TransferError, match="given up"):
        await asyncio.wait_for(incoming.arrival(), TIMEOUT_S)
    await asyncio.wait_for(incoming.fence(), TIMEOUT_S)


async def test_a_ticket_that_nobody_uses_lapses(pair):
    receiver = await pair.receiver(lease_ms=100)
    incoming = receiver.expect(0, [1])
    with pytest.raises(LeaseExpired):
        await asyncio.wait_for(incoming.arrival(), TIMEOUT_S)
    await incoming.fence()
    assert receiver.num_failed == 1


async def test_a_writer_that_falls_silent_loses_its_lease(pair):
    now_s = [0.0]
    receiver = await pair.receiver(lease_ms=100, clock=lambda: now_s[0])
    incoming = receiver.expect(0, [1])
    async with raw_peer(pair, receiver.endpoint) as peer:
        await peer.greet(("shm",))
        await peer.open(incoming.ticket)
        now_s[0] += 1
        with pytest.raises(LeaseExpired):
            await asyncio.wait_for(incoming.arrival(), TIMEOUT_S)
        assert (await peer.receive("revoke")).code == "lease_expired"
        fencing = asyncio.create_task(incoming.fence())
        await peer.send(renew=pb.Renew(ticket_id=incoming.ticket.ticket_id))
        for _ in range(3):  # an answer, and reminders
            await peer.receive("revoke")
        assert not fencing.done()
        await peer.send(revoked=pb.Revoked(ticket_id=incoming.ticket.ticket_id))
        await asyncio.wait_for(fencing, TIMEOUT_S)


async def test_other_models_do_not_pair(pair):
    receiver, sender = await pair.receiver(), await pair.sender(fingerprint="another")
    ticket = receiver.expect(0, [1]).ticket
    with pytest.raises(TransferRefused, match="different KV layouts"):
        await sender.open(ticket)
    ticket.layout_fingerprint = "another"
    with pytest.raises(TransferRefused, match="different KV layouts"):
        await sender.open(ticket)


async def test_no_common_transport_is_refused(pair):
    receiver, sender = await pair.receiver(transports=("tcp",)), await pair.sender(transports=("shm",))
    with pytest.raises(TransferRefused, match="shm offered, tcp accepted"):
        await sender.open(receiver.expect(0, [1]).ticket)
    with pytest.raises(ConfigError, match="kv_transport"):
        await pair.sender(transports=("rdma",))


async def test_tickets_of_another_life_are_refused(pair, transport):
    receiver, sender = await pair.receiver(epoch=3), await pair.sender(transports=(transport,))
    stale = receiver.expect(0, [1]).ticket
    stale.decode_epoch = 2
    with pytest.raises(TransferRefused, match="epoch 2"):
        await sender.open(stale)
    current = receiver.expect(0, [2])
    push = await sender.open(current.ticket)
    with pytest.raises(TransferRefused, match="epoch 2"):
        await sender.open(stale)
    assert not push.revoked.is_set()
    await push.abandon("done")


async def test_a_later_life_gets_a_connection_of_its_own(pair, transport):
    receiver, sender = await pair.receiver(epoch=3), await pair.sender(transports=(transport,))
    push = await sender.open(receiver.expect(0, [1]).ticket)
    promised = receiver.expect(0, [2]).ticket
    promised.decode_epoch = 4
    with pytest.raises(TransferRefused, match="epoch 4"):
        await sender.open(promised)
    with pytest.raises(TransferError):
        await push.commit(1)
    await (await sender.open(receiver.expect(0, [3]).ticket)).abandon("done")


async def test_tickets_are_honoured_once(pair, transport):
    receiver, sender = await pair.receiver(), await pair.sender(transports=(transport,))
    incoming = receiver.expect(0, [1])
    await incoming.fence()
    with pytest.raises(TransferRefused, match="not honoured"):
        await sender.open(incoming.ticket)
    other = await pair.sender(transports=(transport,))
    taken = receiver.expect(0, [2])
    push = await sender.open(taken.ticket)
    with pytest.raises(TransferRefused, match="not honoured"):
        await other.open(taken.ticket)
    assert not push.revoked.is_set()


async def test_a_local_ticket_is_for_this_process(pair):
    receiver, stranger = await pair.receiver(), await pair.sender()
    local = await pair.sender(local=receiver)
    incoming = receiver.expect_local()
    with pytest.raises(TransferRefused, match="within decode-0"):
        await stranger.open(incoming.ticket)
    posing = pb.Ticket.FromString(incoming.ticket.SerializeToString())
    posing.endpoint = receiver.endpoint
    with pytest.raises(TransferRefused, match="not honoured"):
        await stranger.open(posing)
    push = await local.open(incoming.ticket)
    await push.abandon("cancelled")
    with pytest.raises(TransferError, match="cancelled"):
        await incoming.arrival()
    await incoming.fence()


async def test_local_blocks_given_up_before_they_were_accepted_are_not_taken(pair):
    receiver = await pair.receiver()
    sender = await pair.sender(local=receiver)
    incoming = receiver.expect_local()
    push = await sender.open(incoming.ticket)
    committing = asyncio.create_task(push.commit(1, [4, 5]))
    await incoming.arrival()
    await push.abandon("cancelled")
    with pytest.raises(TransferError, match="cancelled"):
        incoming.accept()
    with pytest.raises(TransferError, match="abandoned"):
        await committing


async def test_taking_a_local_ticket_back_ends_its_push(pair):
    receiver = await pair.receiver()
    sender = await pair.sender(local=receiver)
    incoming = receiver.expect_local()
    push = await sender.open(incoming.ticket)
    await incoming.fence()
    with pytest.raises(TransferRefused, match="taken back"):
        await push.commit(1, [4])


async def test_garbage_does_no_harm(pair):
    receiver = await pair.receiver()
    incoming = receiver.expect(0, [1])
    ticket_id = incoming.ticket.ticket_id
    async with raw_peer(pair, receiver.endpoint) as peer:
        await peer.send(push=pb.Push(ticket_id=ticket_id, layer=0, indices=[0], checksums=[1]))
        await peer.greet()
        for garbage in ([b"\xff\xff\xff"], [b""], [b"x" * 1000, b"y"], [b"", b"", b""]):
            await peer.socket.send_multipart(garbage)
        await peer.send(welcome=pb.Welcome(worker_id="raw"))
        await peer.send(push=pb.Push(ticket_id=999, layer=0, indices=[0], checksums=[1]))
        assert (await peer.receive("revoke")).ticket_id == 999
        await peer.open(incoming.ticket)
        assert receiver.num_bad_frames == 6
        assert incoming.state.failure is None
    await assert_still_serves(pair, receiver)


@pytest.mark.parametrize(
    ("push", "sizes"),
    [
        (pb.Push(layer=99, indices=[0], checksums=[0]), [1]),
        (pb.Push(layer=0, indices=[7], checksums=[0]), [1]),
        (pb.Push(layer=0, indices=[0, 1], checksums=[0]), [2]),
        (pb.Push(layer=0, indices=[0], checksums=[0]), [2]),
        (pb.Push(layer=0, indices=[0], checksums=[0]), []),
        (pb.Push(layer=0, indices=[0, 1], checksums=[0, 0]), [0.5, 1.5]),
        (pb.Push(layer=0, indices=[], checksums=[]), []),
    ],
)
async def test_bad_pushes_write_nothing_and_end_the_ticket(pair, push, sizes):
    receiver = await pair.receiver()
    incoming = receiver.expect(0, [1, 2])
    push.ticket_id = incoming.ticket.ticket_id
    payload = [b"z" * int(size * pair.layout.region_bytes) for size in sizes]
    async with raw_peer(pair, receiver.endpoint) as peer:
        await peer.greet()
        await peer.open(incoming.ticket)
        await peer.send(payload, push=push)
        with pytest.raises(TransferRefused, match="bad push"):
            await asyncio.wait_for(incoming.arrival(), TIMEOUT_S)
        assert (await peer.receive("revoke")).code == "transfer_refused"
        await asyncio.wait_for(incoming.fence(), TIMEOUT_S)
    pair.assert_untouched(except_blocks=[])
    assert receiver.num_bad_frames == 1
    await assert_still_serves(pair, receiver)


async def test_a_block_pushed_twice_with_other_bytes_ends_the_ticket(pair):
    receiver = await pair.receiver()
    incoming = receiver.expect(0, [1])
    size = pair.layout.region_bytes
    async with raw_peer(pair, receiver.endpoint) as peer:
        await peer.greet()
        await peer.open(incoming.ticket)
        for content in (b"a" * size, b"a" * size, b"b" * size):
            found = checksums(Pieces.of([memoryview(content)], size), size)
            push = pb.Push(ticket_id=incoming.ticket.ticket_id, layer=0, indices=[0], checksums=found)
            await peer.send([content], push=push)
        with pytest.raises(TransferRefused, match="pushed twice"):
            await asyncio.wait_for(incoming.arrival(), TIMEOUT_S)
        await incoming.fence()
    assert pair.target.region(0, 1) == b"a" * size


async def test_an_oversized_frame_costs_its_sender_the_connection(pair):
    receiver = await pair.receiver()
    incoming = receiver.expect(0, [1])
    async with raw_peer(pair, receiver.endpoint) as peer:
        await peer.greet()
        await peer.open(incoming.ticket)
        await peer.send([b"z" * 2**23], push=pb.Push(ticket_id=incoming.ticket.ticket_id))
        with pytest.raises(TransferError, match="connection"):
            await asyncio.wait_for(incoming.arrival(), TIMEOUT_S)
    pair.assert_untouched(except_blocks=[])
    await assert_still_serves(pair, receiver)


async def test_an_early_commit_fails(pair):
    receiver, sender = await pair.receiver(), await pair.sender(transports=("tcp",))
    incoming = receiver.expect(0, [1])
    push = await sender.open(incoming.ticket)
    push.send(0, [0], range(1))
    with pytest.raises(TransferError, match="2 regions missing"):
        await push.commit(1)
    with pytest.raises(TransferError, match="2 regions missing"):
        await incoming.arrival()


async def test_a_lost_writer_in_shared_memory_is_fenced_by_its_next_hello(pair):
    receiver = await pair.receiver()
    incoming = receiver.expect(0, [1])
    async with raw_peer(pair, receiver.endpoint) as peer:
        await peer.greet(("shm",), sender_id=5)
        await peer.open(incoming.ticket)
    with pytest.raises(TransferError, match="connection to the writer was lost"):
        await asyncio.wait_for(incoming.arrival(), TIMEOUT_S)
    fencing = asyncio.create_task(incoming.fence())
    async with raw_peer(pair, receiver.endpoint) as peer:
        await peer.greet(("shm",), sender_id=6)
        assert not fencing.done()
        await peer.greet(("shm",), sender_id=5, number=2)
        await asyncio.wait_for(fencing, TIMEOUT_S)


async def test_a_hello_that_was_overtaken_does_not_stop_the_later_writer(pair):
    """What a connection said before it broke may be read after the first words of the connection that replaced it."""
    receiver = await pair.receiver()
    incoming = receiver.expect(0, [1])
    async with raw_peer(pair, receiver.endpoint) as late, raw_peer(pair, receiver.endpoint) as peer:
        await late.greet(sender_id=9)
        await peer.greet(("shm",), sender_id=5, number=2)
        await peer.open(incoming.ticket)
        fencing = asyncio.create_task(incoming.fence())
        await peer.receive("revoke")
        await late.send(hello=pb.Hello(sender_id=5, number=1, layout_fingerprint=pair.layout.fingerprint()))
        await late.send(renew=pb.Renew(ticket_id=99))
        await late.receive("revoke")  # so the Hello before it was read
        assert not fencing.done()
        await peer.send(revoked=pb.Revoked(ticket_id=incoming.ticket.ticket_id))
        await asyncio.wait_for(fencing, TIMEOUT_S)


async def test_strangers_are_told_to_connect_anew(pair):
    receiver = await pair.receiver()
    async with raw_peer(pair, receiver.endpoint) as peer:
        await peer.send(renew=pb.Renew(ticket_id=1))
        assert "not known" in (await peer.receive("welcome")).refusal


async def test_a_closed_receiver_ends_what_is_open(pair, transport):
    receiver, sender = await pair.receiver(), await pair.sender(transports=(transport,))
    incoming = receiver.expect(0, [1])
    push = await sender.open(incoming.ticket)
    await receiver.__aexit__(None, None, None)
    with pytest.raises(TransferError, match="closed"):
        await incoming.arrival()
    if transport == "shm":
        with pytest.raises(TransferError, match="closed"):
            await incoming.fence()
    else:
        await incoming.fence()
    with pytest.raises(TransferError):
        await asyncio.wait_for(push.commit(1), TIMEOUT_S)
    with pytest.raises(TransferError):
        await asyncio.wait_for(sender.open(incoming.ticket), TIMEOUT_S)


async def test_a_closed_sender_ends_what_is_open(pair, transport):
    receiver, sender = await pair.receiver(), await pair.sender(transports=(transport,))
    incoming = receiver.expect(0, [1])
    await sender.open(incoming.ticket)
    await sender.__aexit__(None, None, None)
    with pytest.raises(TransferError, match="closed"):
        await asyncio.wait_for(incoming.arrival(), TIMEOUT_S)
    await asyncio.wait_for(incoming.fence(), TIMEOUT_S)


class RawReceiver:
    """Answers a sender frame by frame, well or badly."""

    def __init__(self, context: zmq.asyncio.Context) -> None:
        self.socket = context.socket(zmq.ROUTER)
        self.socket.bind("tcp://127.0.0.1:*")
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._connection = b""

    async def receive(self, kind: str) -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                self._connection, data, *_ = await self.socket.recv_multipart()
                frame = pb.TransferFrame.FromString(data)
                if frame.HasField(kind):
                    return getattr(frame, kind)

    async def send(self, **message: Any) -> None:
        await self.send_bytes(pb.TransferFrame(**message).SerializeToString())

    async def send_bytes(self, data: bytes) -> None:
        await self.socket.send_multipart([self._connection, data])

    def ticket(self, pair: Any) -> pb.Ticket:
        return pb.Ticket(
            ticket_id=1,
            decode_worker_id="raw",
            decode_epoch=1,
            endpoint=self.endpoint,
            layout_fingerprint=pair.layout.fingerprint(),
            block_ids=[0],
            lease_ms=60_000,
            block_size=pair.layout.block_size,
            num_kv_heads=pair.layout.num_kv_heads,
        )


@pytest.fixture
async def raw_receiver() -> AsyncIterator[RawReceiver]:
    context = zmq.asyncio.Context()
    try:
        yield RawReceiver(context)
    finally:
        context.destroy(linger=0)


async def test_every_revoke_is_answered(pair, raw_receiver):
    sender = await pair.sender()
    opening = asyncio.create_task(sender.open(raw_receiver.ticket(pair)))
    await raw_receiver.receive("hello")
    await raw_receiver.send(welcome=pb.Welcome(worker_id="raw", epoch=1, transport="tcp", format=FORMAT))
    await raw_receiver.receive("open")
    await raw_receiver.send(revoke=pb.Revoke(ticket_id=99))
    assert (await raw_receiver.receive("revoked")).ticket_id == 99
    await raw_receiver.send(opened=pb.Opened(ticket_id=1))
    push = await opening
    await raw_receiver.send(revoke=pb.Revoke(ticket_id=1, code="lease_expired", reason="too slow"))
    assert (await raw_receiver.receive("revoked")).ticket_id == 1
    with pytest.raises(LeaseExpired, match="too slow"):
        await push.commit(1)


async def open_in_place(pair: Any, sender: Any, raw_receiver: RawReceiver) -> Push:
    """Over shared memory."""
    opening = asyncio.create_task(sender.open(raw_receiver.ticket(pair)))
    await raw_receiver.receive("hello")
    await raw_receiver.send(
        welcome=pb.Welcome(worker_id="raw", epoch=1, transport="shm", segment=pair.target.segment, format=FORMAT)
    )
    await raw_receiver.receive("open")
    await raw_receiver.send(opened=pb.Opened(ticket_id=1))
    return await opening


@pytest.mark.parametrize("last", [b"\xff\xff", pb.TransferFrame(welcome=pb.Welcome(refusal="not known")).SerializeToString()])
async def test_a_lost_connection_over_shared_memory_is_made_anew_without_a_push(pair, raw_receiver, last):
    push = await open_in_place(pair, await pair.sender(), raw_receiver)
    await raw_receiver.send_bytes(last)
    with pytest.raises(TransferError):
        await push.commit(1)
    assert (await raw_receiver.receive("hello")).number == 2


async def test_a_connection_that_breaks_before_welcome_tells_what_the_one_before_could_not(pair, raw_receiver):
    sender = await pair.sender()
    await open_in_place(pair, sender, raw_receiver)
    await raw_receiver.send_bytes(b"\xff\xff")
    await raw_receiver.receive("hello")
    opening = asyncio.create_task(sender.open(raw_receiver.ticket(pair)))
    assert (await raw_receiver.receive("hello")).number == 3
    await raw_receiver.send_bytes(b"\xff\xff")
    with pytest.raises(TransferError, match="no transfer frame"):
        await opening
    assert (await raw_receiver.receive("hello")).number == 4


@pytest.mark.usefixtures("transfer_threads")
async def test_hello_waits_for_the_writes_of_the_connection_before(pair, raw_receiver, monkeypatch):
    loop, begun, may_end = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    honest = ShmWriter.write

    def slow(writer: Any, parcel: Any, regions: list[memoryview]) -> tuple[list[int], list[memoryview]]:
        loop.call_soon_threadsafe(begun.set)
        asyncio.run_coroutine_threadsafe(may_end.wait(), loop).result(TIMEOUT_S)
        return honest(writer, parcel, regions)

    monkeypatch.setattr(ShmWriter, "write", slow)
    sender = await pair.sender()
    push = await open_in_place(pair, sender, raw_receiver)
    push.send(0, [0], range(1))
    await begun.wait()
    await raw_receiver.send_bytes(b"\xff\xff")
    await push.revoked.wait()
    hello = asyncio.create_task(raw_receiver.receive("hello"))
    opening = asyncio.create_task(sender.open(raw_receiver.ticket(pair)))
    # By now the new connection has told the old one to close; a Hello sent too early would come well within this time.
    assert not (await asyncio.wait({hello, opening}, timeout=0.2))[0]
    may_end.set()
    assert (await hello).number == 2
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)


async def test_a_receiver_that_does_not_answer_is_given_up(pair, raw_receiver, monkeypatch):
    monkeypatch.setattr("kv_transfer.sender._OPEN_TIMEOUT_S", 0.05)
    sender = await pair.sender()
    with pytest.raises(TransferError, match="did not answer"):
        await sender.open(raw_receiver.ticket(pair))
    await raw_receiver.receive("hello")


@pytest.mark.parametrize(
    ("welcome", "problem"),
    [
        (pb.Welcome(worker_id="raw", epoch=2, transport="tcp"), "epoch 2"),
        (pb.Welcome(worker_id="raw", epoch=1, transport="tcp"), "kv_wire"),
        (pb.Welcome(worker_id="another", epoch=1, transport="tcp"), "another"),
        (pb.Welcome(worker_id="raw", epoch=1, transport="rdma"), "not offered"),
        (pb.Welcome(worker_id="raw", epoch=1, refusal="we do not match"), "we do not match"),
    ],
)
async def test_a_wrong_welcome_is_refused(pair, raw_receiver, welcome, problem):
    sender = await pair.sender()
    opening = asyncio.create_task(sender.open(raw_receiver.ticket(pair)))
    await raw_receiver.receive("hello")
    await raw_receiver.send(welcome=welcome)
    with pytest.raises(TransferRefused, match=problem):
        await opening


async def test_garbage_from_a_receiver_ends_the_connection(pair, raw_receiver):
    sender = await pair.sender()
    opening = asyncio.create_task(sender.open(raw_receiver.ticket(pair)))
    await raw_receiver.receive("hello")
    await raw_receiver.send_bytes(b"\xff\xff")
    with pytest.raises(TransferError, match="no transfer frame"):
        await opening


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:1", "nonsense", "inproc://x", ""])
async def test_endpoints_where_nobody_listens_are_errors(pair, endpoint):
    receiver, sender = await pair.receiver(), await pair.sender()
    ticket = receiver.expect(0, [1]).ticket
    ticket.endpoint = endpoint
    with pytest.raises(TransferError):
        await asyncio.wait_for(sender.open(ticket), TIMEOUT_S)
    await assert_still_serves(pair, receiver)


async def test_an_address_of_another_machine_is_a_wrong_setting(pair):
    with pytest.raises(ConfigError, match="host"):
        async with type(await pair.receiver())(None, pair.target, host="192.0.2.1"):
            pass


async def test_a_receiver_that_falls_silent_is_given_up(pair, monkeypatch):
    monkeypatch.setattr(connections, "_TICK_S", 0.01)
    receiver = await pair.receiver()
    sender = await pair.sender(transports=("tcp",))
    ticket = receiver.expect(0, [1]).ticket
    with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as silent:
        silent.bind("tcp://127.0.0.1:*")
        ticket.endpoint = silent.getsockopt_string(zmq.LAST_ENDPOINT)
        opening = asyncio.create_task(sender.open(ticket))
        who, _ = await silent.recv_multipart()
        welcome = pb.Welcome(worker_id="decode-0", epoch=3, transport="tcp", format=FORMAT)
        await silent.send_multipart([who, pb.TransferFrame(welcome=welcome).SerializeToString()])
        with pytest.raises(TransferError, match="decode-0 said nothing"):
            await asyncio.wait_for(opening, TIMEOUT_S)


async def test_a_receiver_that_pings_is_not_silent(pair, monkeypatch):
    monkeypatch.setattr(connections, "_TICK_S", 3600)
    receiver = await pair.receiver()
    sender = await pair.sender(transports=("tcp",))
    await sender.open(receiver.expect(0, [1]).ticket)
    (connection,) = sender._connections.values()
    connection._num_silent_ticks = connections._MAX_SILENT_TICKS
    async with asyncio.timeout(TIMEOUT_S):
        while connection._num_silent_ticks:  # noqa: ASYNC110 - whatever comes next is a Ping
            await asyncio.sleep(0.001)


async def test_a_connection_that_breaks_while_nobody_reads_does_no_harm():
    with zmq.Context() as context, context.socket(zmq.DEALER) as writer:
        receiver, endpoint = await bind_receiver(context, "127.0.0.1", 2**16)
        writer.setsockopt(zmq.SNDHWM, 1)
        writer.connect(endpoint)
        while writer.poll(200, zmq.POLLOUT):  # until the receiver takes no more
            writer.send(bytes(2**16))
        writer.close(0)
        # With heartbeats libzmq would end this process about a second later, in a thread that nobody can wait for.
        await asyncio.sleep(2)
        assert len(await receiver.receive()) == 2
        receiver.close()
