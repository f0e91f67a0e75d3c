"""One ticket, seen from the decode service that asked for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.faults import Faults
from kv_transfer.protocol import LOCAL, Failure, Frames, ReceivePhase, ReceivingTicket
from kv_transfer.transports import PushReader
from segue.errors import TransferRefused
from segue.v1 import transfer_pb2 as pb


@dataclass(frozen=True, slots=True)
class Arrival:
    """A prompt's KV cache, complete and checked. `source_blocks` are its blocks when the writer is this very process."""

    first_token: int
    num_bytes: int
    source_blocks: tuple[int, ...] | None
    # shm, tcp, local.
    transport: str


@dataclass(frozen=True, slots=True)
class Intake:
    """What takes a ticket's pushes in, and whether the event loop does or the transfer thread."""

    reader: PushReader
    is_quick: bool


class Incoming:
    """`apply` is what the receiver wants to be told after each change of the ticket made here."""

    def __init__(
        self, ticket: pb.Ticket, state: ReceivingTicket, apply: Callable[[Incoming, Frames], None], faults: Faults
    ) -> None:
        self.ticket = ticket
        # As a list: a field of a message makes each number anew whenever it is read.
        self.block_ids = list(ticket.block_ids)
        # From the first push on.
        self.intake: Intake | None = None
        self.state = state
        self._apply = apply
        self._faults = faults
        self._settled = asyncio.Event()
        self._fenced = asyncio.Event()
        self._taken_back = False
        self._left_open: Failure | None = None

    async def arrival(self) -> Arrival:
        """Returns once the writer committed and every region arrived with its checksum right.

        Raises ChecksumMismatch, LeaseExpired, TransferRefused or TransferError; also when the ticket failed after it arrived.
        """
        await self._settled.wait()
        state = self.state
        if state.failure is not None:
            raise state.failure.error()
        self._faults.step("arrived")
        blocks = state.source_blocks if state.transport == LOCAL else None
        return Arrival(state.first_token, state.num_bytes, blocks, state.transport)

    def accept(self) -> None:
        """Sends the receipt: the blocks are taken over. Raises TransferError when the ticket failed meanwhile."""
        receipt = self.state.accept()
        self._faults.step("accepted")
        self._apply(self, receipt)

    async def fence(self) -> None:
        """Takes the ticket back. Returns when nothing can write into its blocks any more; until then they are in quarantine.

        Over shared memory that may take until the writer's death. Raises TransferError when the receiver is closed before.
        """
        self._taken_back = True
        reason = f"ticket {self.ticket.ticket_id} was taken back"
        self._apply(self, self.state.revoke(Failure(TransferRefused, reason)))
        await self._fenced.wait()
        if self._left_open is not None:
            raise self._left_open.error()

    def notice(self) -> bool:
        """Wakes those who wait for what the state has become. True when it has just failed, and not by our own will."""
        has_failed = self.state.failure is not None and not self._settled.is_set() and not self._taken_back
        if self.state.phase in {ReceivePhase.ARRIVED, ReceivePhase.ACCEPTED, ReceivePhase.FAILED}:
            self._settled.set()
        if self.state.is_fenced:
            self._fenced.set()
        return has_failed

    def leave_open(self, failure: Failure) -> None:
        """The receiver goes away; a writer may still be at work."""
        if not self._fenced.is_set():
            self._left_open = failure
            self._fenced.set()
