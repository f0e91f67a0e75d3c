"""Both ticket state machines play against each other over a bad network: frames are reordered, repeated and lost, either side
gives up or dies at any moment, bytes get damaged. What must hold then is checked after every step."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.protocol import Failure, Frames, ReceivePhase, ReceivingTicket, SendingTicket, SendPhase
from segue.errors import ChecksumMismatch, TransferError, TransferRefused
from segue.v1 import transfer_pb2 as pb

NUM_LAYERS, NUM_BLOCKS = 2, 2
CHUNKS = [(layer, (index,)) for layer in range(NUM_LAYERS) for index in range(NUM_BLOCKS)]
RECEIVE_TRANSITIONS = {
    ReceivePhase.GRANTED: {ReceivePhase.OPEN, ReceivePhase.FAILED},
    ReceivePhase.OPEN: {ReceivePhase.COMMITTED, ReceivePhase.ARRIVED, ReceivePhase.FAILED},
    ReceivePhase.COMMITTED: {ReceivePhase.ARRIVED, ReceivePhase.FAILED},
    ReceivePhase.ARRIVED: {ReceivePhase.ACCEPTED, ReceivePhase.FAILED},
    ReceivePhase.ACCEPTED: set(),
    ReceivePhase.FAILED: set(),
}


def value(layer: int, index: int) -> int:
    """Stands for a region's bytes and for their checksum."""
    return 10 + layer * NUM_BLOCKS + index


class Simulation:
    def __init__(self, transport: str) -> None:
        self.transport = transport
        self.sender = SendingTicket(1, decode_epoch=3)
        self.receiver = ReceivingTicket(1, 3, NUM_LAYERS, NUM_BLOCKS, lease_s=100.0, heard_s=0.0)
        self.now_s = 0.0
        self.to_receiver: Frames = self.sender.open()
        self.to_sender: Frames = []
        self.unwritten = list(CHUNKS)
        # The chunk that the writer's thread is busy with.
        self.writing: tuple[int, tuple[int, ...]] | None = None
        self.writer_is_alive = True
        # The receiver's blocks: (layer, index) → bytes.
        self.blocks: dict[tuple[int, int], int] = {}
        # Pushes that the receiver's thread has to check, with the bytes that came along.
        self.unchecked: list[list[tuple[int, int, int, int]]] = []
        self.was_fenced = False

    def land(self, layer: int, index: int, content: int) -> None:
        assert not self.receiver.is_fenced, "a write landed in blocks that were taken back"
        self.blocks[layer, index] = content

    # The writer

    def begin_write(self, _: int) -> None:
        if self.writer_is_alive and self.writing is None and self.unwritten and self.sender.may_write:
            self.writing = self.unwritten.pop(0)

    def end_write(self, _: int) -> None:
        if self.writing is None:
            return
        (layer, indices), self.writing = self.writing, None
        if self.transport == "shm":
            for index in indices:
                self.land(layer, index, value(layer, index))
        self.to_receiver += self.sender.push(layer, indices, [value(layer, index) for index in indices])

    def commit(self, _: int) -> None:
        if self.writer_is_alive and not self.unwritten and self.writing is None:
            self.to_receiver += self.sender.commit(5, ())

    def abandon(self, _: int) -> None:
        if self.writer_is_alive:
            self.sender.abandon("cancelled")

    def stop_writes(self, _: int) -> None:
        if self.writer_is_alive and self.sender.is_over and self.writing is None:
            self.to_receiver += self.sender.writes_stopped()

    def kill_writer(self, _: int) -> None:
        """The receiver hears of a death after all that the dead one had said, or was about to write, is settled."""
        self.writer_is_alive, self.writing = False, None
        self.sender.fail(Failure(TransferError, "dead"))
        self.to_sender.clear()
        self.receiver.writer_stopped()

    def break_connection(self, _: int) -> None:
        self.to_receiver.clear()
        self.to_sender.clear()
        self.sender.fail(Failure(TransferError, "lost"))
        self.receiver.writer_lost()

    # The network

    def deliver_to_receiver(self, pick: int) -> None:
        if self.to_receiver:
            self.on_receiver(self.to_receiver.pop(pick % len(self.to_receiver)))

    def deliver_to_sender(self, pick: int) -> None:
        if self.to_sender:
            self.on_sender(self.to_sender.pop(pick % len(self.to_sender)))

    def deliver_in_order(self, _: int) -> None:
        self.deliver_to_receiver(0)
        self.deliver_to_sender(0)

    def repeat_frame(self, pick: int) -> None:
        if self.to_receiver:
            self.to_receiver.append(self.to_receiver[pick % len(self.to_receiver)])

    def drop_frame(self, pick: int) -> None:
        for queue in (self.to_receiver, self.to_sender):
            if queue:
                queue.pop(pick % len(queue))

    def on_receiver(self, frame: pb.TransferFrame) -> None:
        receiver, writer = self.receiver, self.sender
        if frame.HasField("push"):
            push = frame.push
            sizes = [8] * len(push.indices) if self.transport == "tcp" else []
            fresh, frames = receiver.push(writer, push, sizes, self.now_s)
            self.to_sender += frames
            if fresh:
                contents = [
                    (push.layer, index, checksum, value(push.layer, index))
                    for index, checksum in zip(fresh.indices, fresh.checksums, strict=True)
                ]
                self.unchecked.append(contents)
        else:
            self.to_sender += receiver.on_frame(writer, self.transport, 8, frame, self.now_s)

    def on_sender(self, frame: pb.TransferFrame) -> None:
        self.sender.on_frame(frame)

    # The receiver

    def check(self, pick: int) -> None:
        if not self.unchecked:
            return
        regions = self.unchecked.pop(pick % len(self.unchecked))
        holds = True
        for layer, index, checksum, content in regions:
            if self.transport == "tcp":
                self.land(layer, index, content)
            holds &= self.blocks.get((layer, index)) == checksum
        failure = None if holds else Failure(ChecksumMismatch, "damaged")
        self.to_sender += self.receiver.verified(len(regions), failure)

    def damage(self, pick: int) -> None:
        """Before the receiver looks: what is unchecked or not even announced."""
        if self.transport == "shm" and self.receiver.phase is ReceivePhase.OPEN and self.receiver.num_verified == 0:
            for key in list(self.blocks)[pick % NUM_BLOCKS :]:
                self.blocks[key] = 0

    def accept(self, _: int) -> None:
        if self.receiver.phase is ReceivePhase.ARRIVED:
            self.to_sender += self.receiver.accept()

    def take_back(self, _: int) -> None:
        self.to_sender += self.receiver.revoke(Failure(TransferRefused, "taken back"))

    def pass_time(self, pick: int) -> None:
        self.now_s += pick
        self.to_sender += self.receiver.expire(self.now_s)

    def step(self, action: Callable[[int], None], pick: int) -> None:
        before = self.receiver.phase
        action(pick)
        after = self.receiver.phase
        assert after is before or after in RECEIVE_TRANSITIONS[before], f"{before} → {after}"
        assert (self.receiver.failure is not None) == (after is ReceivePhase.FAILED)
        if after in {ReceivePhase.ARRIVED, ReceivePhase.ACCEPTED}:
            assert self.blocks == {(layer, index): value(layer, index) for layer, (index,) in CHUNKS}
            assert self.receiver.first_token == 5
        if self.sender.phase is SendPhase.COMPLETE:
            assert after is ReceivePhase.ACCEPTED
        assert self.receiver.is_fenced or not self.was_fenced, "a fence was lifted"
        self.was_fenced = self.receiver.is_fenced


ORDERLY = [
    Simulation.begin_write,
    Simulation.end_write,
    Simulation.commit,
    Simulation.deliver_to_receiver,
    Simulation.deliver_to_sender,
    Simulation.check,
    Simulation.accept,
    Simulation.stop_writes,
]
ORDERLY_NAMES = [action.__name__ for action in ORDERLY]
MISHAPS = ["abandon", "kill_writer", "break_connection", "repeat_frame", "drop_frame", "damage", "take_back", "pass_time"]
STEPS = st.lists(
    st.tuples(st.sampled_from([*ORDERLY_NAMES * 3, *["deliver_in_order"] * 12, *MISHAPS]), st.integers(0, 40)), max_size=80
)


def play_on(simulation: Simulation) -> None:
    """All goes its way, in order, until nothing is left to do."""
    for _ in range(60):
        for name in ORDERLY_NAMES:
            simulation.step(getattr(simulation, name), 0)


@settings(max_examples=250, deadline=None)
@given(st.sampled_from(["shm", "tcp"]), STEPS)
def test_whatever_happens_no_write_lands_in_blocks_taken_back_and_nothing_wrong_arrives(transport, steps):
    simulation = Simulation(transport)
    for name, pick in steps:
        simulation.step(getattr(simulation, name), pick)
    # However badly it went: taking the ticket back and the writer's death set the blocks free.
    simulation.step(simulation.take_back, 0)
    play_on(simulation)
    simulation.step(simulation.kill_writer, 0)
    play_on(simulation)
    assert simulation.receiver.is_fenced


GENTLE = st.lists(st.tuples(st.sampled_from([*ORDERLY_NAMES, "deliver_in_order"]), st.just(0)), max_size=60)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["shm", "tcp"]), GENTLE)
def test_in_order_and_without_losses_everything_arrives(transport, steps):
    simulation = Simulation(transport)
    for name, pick in steps:
        simulation.step(getattr(simulation, name), pick)
    play_on(simulation)
    assert simulation.receiver.phase is ReceivePhase.ACCEPTED
    assert simulation.sender.phase is SendPhase.COMPLETE
    assert simulation.sender.num_bytes == NUM_LAYERS * NUM_BLOCKS * 8


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["shm", "tcp"]), GENTLE, st.sampled_from(["abandon", "take_back"]))
def test_without_losses_both_sides_end_and_the_fence_needs_no_death(transport, steps, end):
    simulation = Simulation(transport)
    for name, pick in steps:
        if name != "accept":
            simulation.step(getattr(simulation, name), pick)
    simulation.step(getattr(simulation, end), 0)
    play_on(simulation)
    assert simulation.receiver.is_fenced
    assert simulation.sender.is_over
