"""One prompt's hand-over: a ticket for each pair of a prefill and a decode rank that have KV heads in common.

Each ticket keeps its own protocol (docs/transfer.md); here they begin, succeed and end together. The hand-over fails with the
first of them that fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from kv_transfer.incoming import Arrival
from segue.errors import TransferRefused
from segue.v1 import transfer_pb2 as pb

T = TypeVar("T")


class IncomingPart(Protocol):
    """One ticket of a reservation: an Incoming, here or on another rank."""

    ticket: pb.Ticket

    async def arrival(self) -> Arrival: ...

    def accept(self) -> None: ...

    async def fence(self) -> None: ...


class PushPart(Protocol):
    """One ticket of a hand-over: a Push, from here or from another rank."""

    ticket: pb.Ticket

    def send(self, layer: int, source_blocks: Sequence[int], blocks: range) -> None: ...

    async def commit(self, first_token: int, source_blocks: Sequence[int]) -> int: ...

    async def abandon(self, reason: str) -> object: ...


class Receiver(Protocol):
    """A KVReceiver, or those of several ranks (kv_transfer/ranks.py)."""

    async def reserve(self, first_block: int, block_ids: Sequence[int], num_writers: int) -> Sequence[IncomingPart]: ...

    def expect_local(self) -> IncomingPart: ...


class Sender(Protocol):
    """A KVSender, or those of several ranks."""

    async def open(self, ticket: pb.Ticket) -> PushPart: ...


async def _all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results; the first error ends them all."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Reservation:
    """The receiving side: blocks that the ranks of one other worker may write."""

    def __init__(self, parts: Sequence[IncomingPart]) -> None:
        self._parts = parts

    @classmethod
    def local(cls, receiver: Receiver) -> Reservation:
        """For a prefill service in this very process, which hands its own blocks over."""
        return cls([receiver.expect_local()])

    @classmethod
    async def of(cls, receiver: Receiver, first_block: int, block_ids: Sequence[int], num_writers: int) -> Reservation:
        """For a worker of `num_writers` ranks, to write the prompt's blocks from `first_block` on into `block_ids`.
        Raises TransferRefused when the heads cannot be shared out so. When cancelled, nothing stays reserved."""
        return cls(await receiver.reserve(first_block, block_ids, num_writers))

    @property
    def tickets(self) -> list[pb.Ticket]:
        return [part.ticket for part in self._parts]

    async def arrival(self) -> Arrival:
        """Returns once everything arrived, as `Incoming.arrival` does for one ticket; raises what the first failure raised."""
        arrivals = await _all(part.arrival() for part in self._parts)
        first = arrivals[0]
        return Arrival(first.first_token, sum(part.num_bytes for part in arrivals), first.source_blocks, first.transport)

    def accept(self) -> None:
        """Sends the receipts. Raises TransferError when a ticket failed meanwhile."""
        for part in self._parts:
            part.accept()

    async def fence(self) -> None:
        """Takes all tickets back; see `Incoming.fence`."""
        await asyncio.gather(*(part.fence() for part in self._parts))


class HandOver:
    """The sending side: pushes to the ranks of one other worker."""

    def __init__(self, pushes: Sequence[PushPart]) -> None:
        self._pushes = pushes

    @classmethod
    async def open(cls, sender: Sender, tickets: Sequence[pb.Ticket]) -> HandOver:
        """Raises as `KVSender.open`; whatever was opened is then given back."""
        if not tickets:
            raise TransferRefused("the other worker gave no ticket")
        opening = [asyncio.create_task(sender.open(ticket)) for ticket in tickets]
        try:
            return cls(await asyncio.gather(*opening))
        except BaseException:
            for task in opening:
                task.cancel()
            done = await asyncio.gather(*opening, return_exceptions=True)
            await asyncio.gather(*(push.abandon("another rank failed") for push in done if not isinstance(push, BaseException)))
            raise

    @property
    def wanted(self) -> range:
        """The prompt's blocks that the tickets are for, as the receiving worker cuts the prompt."""
        ticket = self._pushes[0].ticket
        return range(ticket.first_block, ticket.first_block + len(ticket.block_ids))

    @property
    def block_size(self) -> int:
        """Tokens in one of them."""
        return self._pushes[0].ticket.block_size

    def send(self, layer: int, source_blocks: Sequence[int], blocks: range) -> None:
        """See `Push.send`."""
        for push in self._pushes:
            push.send(layer, source_blocks, blocks)

    async def commit(self, first_token: int, source_blocks: Sequence[int]) -> int:
        """Returns the bytes that travelled once every rank has taken its part over, or raises the first failure."""
        return sum(await _all(push.commit(first_token, source_blocks) for push in self._pushes))

    async def abandon(self, reason: str) -> None:
        """When it returns, nothing of the hand-over will be written any more."""
        await asyncio.gather(*(push.abandon(reason) for push in self._pushes))
