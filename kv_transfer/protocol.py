"""The rules of a hand-over: what each side of one ticket may do when, and what each frame leads to. No input or output here.

    receiving:  GRANTED → OPEN → COMMITTED → ARRIVED → ACCEPTED        any but ACCEPTED → FAILED
    sending:    OPENING → OPEN → COMMITTING → COMPLETE                 any but COMPLETE → FAILED

Three rules carry everything:
1. Nobody writes before Opened, and one connection alone is ever told Opened for a ticket.
2. A writer says Commit, Abandon or Revoked only when no write of its own is under way, and writes nothing afterwards.
3. The receiver takes its blocks back ("fenced") only when no write can land: its writer said so or is dead, or never was.

Handlers return the frames to answer with, to the frame's sender; those of events without a frame go to the ticket's writer.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from segue.errors import LeaseExpired, TransferError, TransferRefused, error_from_code
from segue.v1 import transfer_pb2 as pb

SHM, TCP, DIST, LOCAL = "shm", "tcp", "dist", "local"
Frames = list[pb.TransferFrame]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a transfer ended; `error` makes the exception, anew for each that raises it."""

    kind: type[TransferError]
    reason: str

    def error(self) -> TransferError:
        return self.kind(self.reason)

    @classmethod
    def from_revoke(cls, revoke: pb.Revoke) -> Failure:
        error = error_from_code(revoke.code, revoke.reason)
        return cls(type(error) if isinstance(error, TransferError) else TransferError, revoke.reason)


def revoke_frame(ticket_id: int, failure: Failure) -> pb.TransferFrame:
    return pb.TransferFrame(revoke=pb.Revoke(ticket_id=ticket_id, reason=failure.reason, code=failure.kind.code))


def unknown_ticket(ticket_id: int) -> pb.TransferFrame:
    return revoke_frame(ticket_id, Failure(TransferRefused, f"ticket {ticket_id} is not honoured here (any more)"))


def named_ticket(frame: pb.TransferFrame) -> int | None:
    """The ticket that a sender or a receiver speaks of; None for frames about none."""
    kind = frame.WhichOneof("message")
    return None if kind in {None, "hello", "welcome", "ping"} else getattr(frame, kind).ticket_id


def answer_without_ticket(frame: pb.TransferFrame) -> Frames:
    """The receiver's, where there is no such ticket (any more). Last words need none."""
    match frame.WhichOneof("message"):
        case "open" | "push" | "renew" | "commit" as kind:
            return [unknown_ticket(getattr(frame, kind).ticket_id)]
        case _:
            return []


def answer_without_push(frame: pb.TransferFrame) -> Frames:
    """The sender's, where there is no such push (any more), so that no write of it can be under way."""
    return [revoked_frame(frame.revoke.ticket_id)] if frame.HasField("revoke") else []


class ReceivePhase(enum.Enum):
    GRANTED = "granted"
    OPEN = "open"
    # Commit came; regions that were pushed are still being checked.
    COMMITTED = "committed"
    ARRIVED = "arrived"
    ACCEPTED = "accepted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class FreshRegions:
    """Regions to check and, over TCP, to copy: `positions` count in the push's own bytes, `indices` in the ticket's blocks."""

    positions: Sequence[int] = ()
    indices: Sequence[int] = ()
    checksums: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(slots=True)
class ReceivingTicket:
    """The decode side of one ticket. A writer is whatever stands for one connection, compared by identity."""

    ticket_id: int
    decode_epoch: int
    num_layers: int
    num_blocks: int
    lease_s: float
    heard_s: float
    phase: ReceivePhase = ReceivePhase.GRANTED
    failure: Failure | None = None
    writer: object | None = None
    transport: str = ""
    # As they travel over that transport.
    region_bytes: int = 0
    first_token: int = 0
    source_blocks: tuple[int, ...] = ()
    num_verified: int = 0
    # Regions pushed and not yet checked; over TCP their copying into the blocks is still to come.
    num_unverified: int = 0
    # The writer may be writing in place. False again for good once it said otherwise or is dead.
    writer_active: bool = False
    # [layer]: index → checksum, of all that was pushed.
    pushed: list[dict[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pushed = [{} for _ in range(self.num_layers)]

    @property
    def is_fenced(self) -> bool:
        """The ticket is over, and nothing can be written into its blocks on its behalf any more."""
        over = self.phase in {ReceivePhase.ACCEPTED, ReceivePhase.FAILED}
        return over and self.num_unverified == 0 and not self.writer_active

    @property
    def num_bytes(self) -> int:
        return self.num_verified * self.region_bytes

    def on_frame(self, writer: object, transport: str, region_bytes: int, frame: pb.TransferFrame, now_s: float) -> Frames:
        """Whatever a writer says, except Push, which has bytes to check. `region_bytes` is what it calls a region's."""
        match frame.WhichOneof("message"):
            case "open":
                return self.open(writer, transport, region_bytes, frame.open.decode_epoch, now_s)
            case "renew":
                return self.renew(writer, now_s)
            case "commit":
                return self.commit(writer, frame.commit, now_s)
            case "abandon":
                self.abandon(writer, frame.abandon.reason)
            case "revoked":
                self.revoked(writer)
        return []

    def open(self, writer: object, transport: str, region_bytes: int, decode_epoch: int, now_s: float) -> Frames:
        if decode_epoch != self.decode_epoch:
            return [unknown_ticket(self.ticket_id)]
        if self.phase is ReceivePhase.GRANTED:
            self.phase, self.writer, self.transport = ReceivePhase.OPEN, writer, transport
            self.region_bytes = region_bytes
            # Over TCP the receiver writes, locally nobody does.
            self.writer_active = transport == SHM
        elif writer is not self.writer or self.phase is ReceivePhase.FAILED:
            return [unknown_ticket(self.ticket_id)]
        self.heard_s = now_s
        return [pb.TransferFrame(opened=pb.Opened(ticket_id=self.ticket_id))]

    def push(self, writer: object, push: pb.Push, payload_sizes: Sequence[int], now_s: float) -> tuple[FreshRegions, Frames]:
        """`payload_sizes` are the bytes of each frame that came along. Returns the regions that this push brought, for the
        caller to check (`verified` follows), and the frames to answer with."""
        if writer is not self.writer or self.phase is not ReceivePhase.OPEN:
            return FreshRegions(), self._unexpected_push(writer)
        self.heard_s = now_s
        # Plain lists: a field of a message makes each of its numbers anew whenever it is read.
        indices, checksums = list(push.indices), list(push.checksums)
        if problem := self._problem(push.layer, indices, checksums, payload_sizes):
            return FreshRegions(), self._fail(Failure(TransferRefused, f"bad push for ticket {self.ticket_id}: {problem}"))
        known = self.pushed[push.layer]
        for index, checksum in zip(indices, checksums, strict=True):
            if known.get(index, checksum) != checksum:
                reason = f"layer {push.layer}, block {index} of ticket {self.ticket_id} was pushed twice, with other bytes"
                return FreshRegions(), self._fail(Failure(TransferRefused, reason))
        positions = [position for position, index in enumerate(indices) if index not in known]
        fresh = FreshRegions(positions, [indices[i] for i in positions], [checksums[i] for i in positions])
        known.update(zip(fresh.indices, fresh.checksums, strict=True))
        self.num_unverified += len(fresh)
        return fresh, []

    def verified(self, num_regions: int, failure: Failure | None) -> Frames:
        """`num_regions` of those that `push` gave out were checked, and copied where that was to do."""
        self.num_unverified -= num_regions
        if self.phase not in {ReceivePhase.OPEN, ReceivePhase.COMMITTED}:
            return []
        if failure is not None:
            return self._fail(failure)
        self.num_verified += num_regions
        self._arrive_if_complete()
        return []

    def commit(self, writer: object, commit: pb.Commit, now_s: float) -> Frames:
        if writer is not self.writer or self.phase is ReceivePhase.FAILED:
            return [unknown_ticket(self.ticket_id)]
        if self.phase is not ReceivePhase.OPEN:
            return []
        self.heard_s = now_s
        self.writer_active = False
        if missing := self.num_layers * self.num_blocks - sum(map(len, self.pushed)):
            return self._fail(Failure(TransferError, f"ticket {self.ticket_id} was committed with {missing} regions missing"))
        self.first_token, self.source_blocks = commit.first_token, tuple(commit.source_blocks)
        self.phase = ReceivePhase.COMMITTED
        self._arrive_if_complete()
        return []

    def renew(self, writer: object, now_s: float) -> Frames:
        if writer is not self.writer or self.phase is ReceivePhase.FAILED:
            return [unknown_ticket(self.ticket_id)]
        self.heard_s = now_s
        return []

    def abandon(self, writer: object, reason: str) -> None:
        if writer is self.writer:
            self.writer_active = False
            # Once all bytes are ours they outlast their writer; but blocks handed over as they lie are its own until accepted.
            before_commit = self.phase is ReceivePhase.OPEN
            if before_commit or (self.transport == LOCAL and self.phase is ReceivePhase.ARRIVED):
                self._fail(Failure(TransferError, f"the writer gave up: {reason}"))

    def revoked(self, writer: object) -> None:
        if writer is self.writer and self.phase is ReceivePhase.FAILED:
            self.writer_active = False

    def writer_lost(self) -> None:
        """Its connection broke. What it may still write in place, nobody knows yet."""
        if self.phase is ReceivePhase.OPEN:
            self._fail(Failure(TransferError, "the connection to the writer was lost"))

    def writer_stopped(self) -> None:
        """The writer is dead, or says on another connection that it writes nothing any more."""
        self.writer_active = False
        self.writer_lost()

    def expire(self, now_s: float) -> Frames:
        """Ends the ticket when its writer has said nothing for the length of the lease. After Commit no word is needed."""
        if self.phase not in {ReceivePhase.GRANTED, ReceivePhase.OPEN} or now_s - self.heard_s <= self.lease_s:
            return []
        return self._fail(Failure(LeaseExpired, f"nothing was heard of ticket {self.ticket_id} for {self.lease_s:g} s"))

    def reminder(self) -> Frames:
        """To be repeated until the writer has said its last word, as an answer may be lost."""
        return [revoke_frame(self.ticket_id, self.failure)] if self.failure is not None and self.writer_active else []

    def accept(self) -> Frames:
        """Raises TransferError when the ticket failed meanwhile, ValueError when nothing arrived yet."""
        if self.failure is not None:
            raise self.failure.error()
        if self.phase is not ReceivePhase.ARRIVED:
            raise ValueError(f"ticket {self.ticket_id} is {self.phase.value}: nothing to accept")
        self.phase = ReceivePhase.ACCEPTED
        return [pb.TransferFrame(receipt=pb.Receipt(ticket_id=self.ticket_id, num_bytes=self.num_bytes))]

    def revoke(self, failure: Failure) -> Frames:
        """The receiver takes its blocks back. Nothing happens to a ticket that is over."""
        return [] if self.phase in {ReceivePhase.ACCEPTED, ReceivePhase.FAILED} else self._fail(failure)

    def _unexpected_push(self, writer: object) -> Frames:
        """A stranger's frame leaves the ticket alone; the writer's own shows that the pair has lost its common thread."""
        if writer is not self.writer or self.phase is ReceivePhase.FAILED:
            return [unknown_ticket(self.ticket_id)]
        if self.phase is ReceivePhase.ACCEPTED:
            return []
        return self._fail(Failure(TransferRefused, f"a push for ticket {self.ticket_id}, which was committed already"))

    def _problem(self, layer: int, indices: list[int], checksums: list[int], payload_sizes: Sequence[int]) -> str:
        expected_bytes = len(indices) * self.region_bytes if self.transport in {TCP, DIST} else 0
        if layer >= self.num_layers:
            return f"layer {layer} of {self.num_layers}"
        if not indices or len(indices) != len(checksums):
            return f"{len(indices)} blocks with {len(checksums)} checksums"
        if max(indices) >= self.num_blocks:
            return f"block {max(indices)} of {self.num_blocks}"
        if len(set(indices)) != len(indices):
            return "the same block twice"
        if sum(payload_sizes) != expected_bytes:
            return f"{sum(payload_sizes)} bytes instead of {expected_bytes}"
        if any(size % self.region_bytes for size in payload_sizes):
            return "a region is cut in two"
        return ""

    def _arrive_if_complete(self) -> None:
        if self.phase is ReceivePhase.COMMITTED and self.num_unverified == 0:
            self.phase = ReceivePhase.ARRIVED

    def _fail(self, failure: Failure) -> Frames:
        self.phase, self.failure = ReceivePhase.FAILED, failure
        return [revoke_frame(self.ticket_id, failure)]


class SendPhase(enum.Enum):
    OPENING = "opening"
    OPEN = "open"
    COMMITTING = "committing"
    COMPLETE = "complete"
    FAILED = "failed"


@dataclass(slots=True)
class SendingTicket:
    """The prefill side of one ticket."""

    ticket_id: int
    decode_epoch: int
    phase: SendPhase = SendPhase.OPENING
    failure: Failure | None = None
    num_bytes: int = 0
    # What the receiver has not answered yet.
    _unanswered: Frames = field(default_factory=list)
    # Owed to the receiver as soon as no write is under way.
    _owed: Frames = field(default_factory=list)

    @property
    def may_write(self) -> bool:
        return self.phase is SendPhase.OPEN

    @property
    def is_over(self) -> bool:
        return self.phase in {SendPhase.COMPLETE, SendPhase.FAILED}

    def open(self) -> Frames:
        self._unanswered = [pb.TransferFrame(open=pb.Open(ticket_id=self.ticket_id, decode_epoch=self.decode_epoch))]
        return self._unanswered

    def reminder(self) -> Frames:
        """To be repeated as long as the push lives: keeps the lease, and asks again for what may have been lost."""
        renew = pb.TransferFrame(renew=pb.Renew(ticket_id=self.ticket_id))
        return [] if self.is_over else [*self._unanswered, renew]

    def on_frame(self, frame: pb.TransferFrame) -> None:
        """Whatever the receiver says of this ticket."""
        match frame.WhichOneof("message"):
            case "opened":
                self.opened()
            case "receipt":
                self.receipt(frame.receipt.num_bytes)
            case "revoke":
                self.revoke(Failure.from_revoke(frame.revoke))

    def opened(self) -> None:
        if self.phase is SendPhase.OPENING:
            self.phase, self._unanswered = SendPhase.OPEN, []

    def push(self, layer: int, indices: Sequence[int], checksums: Sequence[int]) -> Frames:
        """After the bytes were written. Nothing is said of them when the ticket ended meanwhile."""
        if self.phase is not SendPhase.OPEN:
            return []
        push = pb.Push(ticket_id=self.ticket_id, layer=layer, indices=indices, checksums=checksums)
        return [pb.TransferFrame(push=push)]

    def commit(self, first_token: int, source_blocks: Sequence[int]) -> Frames:
        """After the last write ended."""
        if self.phase is not SendPhase.OPEN:
            return []
        self.phase = SendPhase.COMMITTING
        commit = pb.Commit(ticket_id=self.ticket_id, first_token=first_token, source_blocks=source_blocks)
        self._unanswered = [pb.TransferFrame(commit=commit)]
        return self._unanswered

    def receipt(self, num_bytes: int) -> None:
        if self.phase is SendPhase.COMMITTING:
            self.phase, self.num_bytes = SendPhase.COMPLETE, num_bytes

    def revoke(self, failure: Failure) -> None:
        self._owed.append(revoked_frame(self.ticket_id))
        self.fail(failure)

    def abandon(self, reason: str) -> None:
        if not self.is_over:
            self._owed.append(pb.TransferFrame(abandon=pb.Abandon(ticket_id=self.ticket_id, reason=reason)))
            self.fail(Failure(TransferError, f"abandoned: {reason}"))

    def fail(self, failure: Failure) -> None:
        if not self.is_over:
            self.phase, self.failure = SendPhase.FAILED, failure

    def writes_stopped(self) -> Frames:
        """No write is under way any more, and as the ticket is over none will begin."""
        owed, self._owed = self._owed, []
        return owed


def revoked_frame(ticket_id: int) -> pb.TransferFrame:
    return pb.TransferFrame(revoked=pb.Revoked(ticket_id=ticket_id))
