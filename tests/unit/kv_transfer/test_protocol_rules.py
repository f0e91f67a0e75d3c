"""Single rules of the two ticket state machines."""

from __future__ import annotations

import pytest

from kv_transfer.protocol import Failure, FreshRegions, ReceivePhase, ReceivingTicket, SendingTicket, SendPhase
from segue.errors import ChecksumMismatch, LeaseExpired, TransferError, TransferRefused
from segue.v1 import transfer_pb2 as pb

WRITER, STRANGER = object(), object()
REGION_BYTES = 8
EPOCH = 3


def receiving(transport: str | None = "shm", num_blocks: int = 2) -> ReceivingTicket:
    """A ticket of two layers, open for WRITER unless `transport` is None."""
    ticket = ReceivingTicket(1, EPOCH, num_layers=2, num_blocks=num_blocks, lease_s=10.0, heard_s=0.0)
    if transport is not None:
        assert kinds(ticket.open(WRITER, transport, REGION_BYTES, EPOCH, 0.0)) == ["opened"]
    return ticket


def push(layer: int = 0, indices: tuple[int, ...] = (0, 1), checksums: tuple[int, ...] | None = None) -> pb.Push:
    return pb.Push(ticket_id=1, layer=layer, indices=indices, checksums=checksums or [100 + i for i in indices])


def push_all(ticket: ReceivingTicket) -> None:
    sizes = [2 * REGION_BYTES] if ticket.transport == "tcp" else []
    for layer in range(2):
        fresh, frames = ticket.push(WRITER, push(layer), sizes, 0.0)
        assert frames == []
        assert fresh.indices == [0, 1]


def kinds(frames: list[pb.TransferFrame]) -> list[str | None]:
    return [frame.WhichOneof("message") for frame in frames]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_transfer_arrives_when_all_is_checked_and_committed(transport: str):
    ticket = receiving(transport)
    push_all(ticket)
    assert ticket.verified(3, None) == []
    assert ticket.commit(WRITER, pb.Commit(ticket_id=1, first_token=9), 0.0) == []
    assert ticket.phase is ReceivePhase.COMMITTED
    ticket.verified(1, None)
    assert ticket.phase is ReceivePhase.ARRIVED
    assert (ticket.first_token, ticket.num_bytes) == (9, 4 * REGION_BYTES)
    assert not ticket.is_fenced
    assert kinds(ticket.accept()) == ["receipt"]
    assert ticket.is_fenced


def test_with_nothing_missing_commit_is_enough():
    ticket = receiving(num_blocks=0)
    ticket.commit(WRITER, pb.Commit(ticket_id=1), 0.0)
    assert ticket.phase is ReceivePhase.ARRIVED


def test_a_commit_with_regions_missing_fails():
    ticket = receiving()
    ticket.push(WRITER, push(), [], 0.0)
    assert kinds(ticket.commit(WRITER, pb.Commit(ticket_id=1), 0.0)) == ["revoke"]
    assert ticket.failure is not None
    assert "2 regions missing" in ticket.failure.reason


@pytest.mark.parametrize(
    ("bad", "sizes", "problem"),
    [
        (push(layer=2), [], "layer 2 of 2"),
        (push(indices=(0, 2)), [], "block 2 of 2"),
        (push(checksums=(1,)), [], "2 blocks with 1 checksums"),
        (push(indices=()), [], "0 blocks"),
        (push(indices=(1, 1)), [], "the same block twice"),
        (push(), [16], "16 bytes instead of 0"),
    ],
)
def test_bad_pushes_end_the_ticket(bad: pb.Push, sizes: list[int], problem: str):
    ticket = receiving()
    fresh, frames = ticket.push(WRITER, bad, sizes, 0.0)
    assert not fresh
    assert kinds(frames) == ["revoke"]
    assert ticket.failure is not None
    assert ticket.failure.kind is TransferRefused
    assert problem in ticket.failure.reason


@pytest.mark.parametrize(("sizes", "problem"), [([8], "8 bytes instead of 16"), ([12, 4], "cut in two"), ([8, 16], "24 bytes")])
def test_pushes_over_tcp_bring_whole_regions(sizes: list[int], problem: str):
    ticket = receiving("tcp")
    fresh, _ = ticket.push(WRITER, push(), sizes, 0.0)
    assert not fresh
    assert ticket.failure is not None
    assert problem in ticket.failure.reason


def test_the_same_push_twice_changes_nothing_but_other_bytes_do():
    ticket = receiving()
    push_all(ticket)
    assert ticket.push(WRITER, push(), [], 0.0) == (FreshRegions([], [], []), [])
    assert ticket.num_unverified == 4
    ticket.push(WRITER, push(checksums=(100, 999)), [], 0.0)
    assert ticket.failure is not None
    assert ticket.failure.kind is TransferRefused


def test_strangers_change_nothing():
    ticket = receiving()
    push_all(ticket)
    assert kinds(ticket.open(STRANGER, "shm", REGION_BYTES, EPOCH, 5.0)) == ["revoke"]
    assert kinds(ticket.push(STRANGER, push(), [], 5.0)[1]) == ["revoke"]
    assert kinds(ticket.commit(STRANGER, pb.Commit(ticket_id=1), 5.0)) == ["revoke"]
    assert kinds(ticket.renew(STRANGER, 5.0)) == ["revoke"]
    ticket.abandon(STRANGER, "mischief")
    ticket.revoke(Failure(TransferRefused, "taken back"))
    ticket.revoked(STRANGER)
    assert (ticket.writer, ticket.heard_s, ticket.writer_active) == (WRITER, 0.0, True)


def test_an_unopened_ticket_is_fenced_at_once():
    ticket = receiving(None)
    assert kinds(ticket.revoke(Failure(TransferRefused, "taken back"))) == ["revoke"]
    assert ticket.is_fenced
    assert kinds(ticket.open(WRITER, "shm", REGION_BYTES, EPOCH, 0.0)) == ["revoke"]
    assert ticket.is_fenced


@pytest.mark.parametrize("last_word", ["revoked", "abandon", "commit", "writer_stopped"])
def test_shared_memory_is_fenced_by_the_writers_last_word(last_word: str):
    ticket = receiving("shm")
    if last_word == "commit":
        push_all(ticket)
        ticket.verified(4, None)
        ticket.commit(WRITER, pb.Commit(ticket_id=1), 0.0)
    ticket.revoke(Failure(TransferRefused, "taken back"))
    ticket.writer_lost()
    if last_word != "commit":
        assert not ticket.is_fenced
    if last_word == "revoked":
        ticket.revoked(WRITER)
    elif last_word == "abandon":
        ticket.abandon(WRITER, "cancelled")
    elif last_word == "writer_stopped":
        ticket.writer_stopped()
    assert ticket.is_fenced


def test_over_tcp_only_the_receivers_own_copying_holds_up_the_fence():
    ticket = receiving("tcp")
    push_all(ticket)
    ticket.revoke(Failure(TransferRefused, "taken back"))
    assert not ticket.is_fenced
    ticket.verified(4, None)
    assert ticket.is_fenced
    assert ticket.num_bytes == 0


def test_leases_live_on_words_and_end_with_commit():
    ticket = receiving()
    assert ticket.expire(10.0) == []
    ticket.renew(WRITER, 9.0)
    assert ticket.expire(19.0) == []
    push_all(ticket)
    ticket.heard_s = 9.0
    assert kinds(ticket.expire(19.1)) == ["revoke"]
    assert ticket.failure is not None
    assert ticket.failure.kind is LeaseExpired

    committed = receiving(num_blocks=0)
    committed.commit(WRITER, pb.Commit(ticket_id=1), 0.0)
    assert committed.expire(1e9) == []


def test_after_commit_the_bytes_outlast_their_writer():
    ticket = receiving()
    push_all(ticket)
    ticket.commit(WRITER, pb.Commit(ticket_id=1), 0.0)
    ticket.abandon(WRITER, "cancelled")
    ticket.writer_stopped()
    ticket.verified(4, None)
    assert ticket.phase is ReceivePhase.ARRIVED


def test_blocks_handed_over_as_they_lie_are_the_writers_until_accepted():
    ticket = receiving("local", num_blocks=0)
    ticket.commit(WRITER, pb.Commit(ticket_id=1, source_blocks=[4, 5]), 0.0)
    assert ticket.source_blocks == (4, 5)
    ticket.abandon(WRITER, "cancelled")
    with pytest.raises(TransferError, match="cancelled"):
        ticket.accept()


def test_a_push_after_commit_shows_a_broken_writer():
    ticket = receiving()
    push_all(ticket)
    ticket.commit(WRITER, pb.Commit(ticket_id=1), 0.0)
    assert kinds(ticket.push(WRITER, push(), [], 0.0)[1]) == ["revoke"]
    assert ticket.phase is ReceivePhase.FAILED


def test_nothing_can_be_accepted_before_it_arrived():
    with pytest.raises(ValueError, match="nothing to accept"):
        receiving().accept()


def test_the_sender_answers_a_revoke_only_when_its_writes_have_stopped():
    ticket = SendingTicket(1, EPOCH)
    assert kinds(ticket.open()) == ["open"]
    assert not ticket.may_write
    ticket.opened()
    assert ticket.may_write
    ticket.revoke(Failure(ChecksumMismatch, "damaged"))
    assert not ticket.may_write
    assert ticket.push(0, [0], [1]) == []
    assert ticket.commit(5, []) == []
    ticket.abandon("too late")
    assert kinds(ticket.writes_stopped()) == ["revoked"]
    assert ticket.writes_stopped() == []
    assert ticket.failure == Failure(ChecksumMismatch, "damaged")


def test_a_revoke_that_crosses_an_abandon_is_answered_too():
    ticket = SendingTicket(1, EPOCH)
    ticket.opened()
    ticket.abandon("cancelled")
    ticket.revoke(Failure(TransferRefused, "taken back"))
    assert kinds(ticket.writes_stopped()) == ["abandon", "revoked"]
    assert ticket.failure is not None
    assert "cancelled" in ticket.failure.reason


def test_a_receipt_counts_after_commit_alone():
    ticket = SendingTicket(1, EPOCH)
    ticket.opened()
    ticket.receipt(7)
    assert ticket.phase is SendPhase.OPEN
    ticket.commit(5, [])
    ticket.receipt(7)
    assert (ticket.phase, ticket.num_bytes) == (SendPhase.COMPLETE, 7)
    ticket.opened()
    ticket.fail(Failure(TransferError, "lost"))
    assert ticket.phase is SendPhase.COMPLETE


def test_what_is_not_answered_is_said_again():
    sender = SendingTicket(1, EPOCH)
    sender.open()
    assert kinds(sender.reminder()) == ["open", "renew"]
    sender.opened()
    assert kinds(sender.reminder()) == ["renew"]
    sender.commit(5, [])
    assert kinds(sender.reminder()) == ["commit", "renew"]
    sender.receipt(7)
    assert sender.reminder() == []

    receiver = receiving("shm")
    assert receiver.reminder() == []
    receiver.revoke(Failure(TransferRefused, "taken back"))
    assert kinds(receiver.reminder()) == ["revoke"]
    receiver.revoked(WRITER)
    assert receiver.reminder() == []


def test_what_is_said_twice_changes_nothing():
    ticket = receiving()
    push_all(ticket)
    ticket.verified(4, None)
    assert ticket.commit(WRITER, pb.Commit(ticket_id=1, first_token=9), 0.0) == []
    assert ticket.commit(WRITER, pb.Commit(ticket_id=1, first_token=9), 0.0) == []
    assert kinds(ticket.open(WRITER, "shm", REGION_BYTES, EPOCH, 0.0)) == ["opened"]
    assert (ticket.phase, ticket.writer_active) == (ReceivePhase.ARRIVED, False)


def test_a_ticket_of_another_epoch_is_not_opened():
    ticket = receiving(None)
    assert kinds(ticket.open(WRITER, "shm", REGION_BYTES, EPOCH - 1, 0.0)) == ["revoke"]
    assert ticket.phase is ReceivePhase.GRANTED


def test_revokes_carry_the_error_that_the_writer_raises():
    for code, kind in [("checksum_mismatch", ChecksumMismatch), ("lease_expired", LeaseExpired), ("internal", TransferError)]:
        failure = Failure.from_revoke(pb.Revoke(ticket_id=1, reason="because", code=code))
        assert failure == Failure(kind, "because")
        assert str(failure.error()) == "because"
