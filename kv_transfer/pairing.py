"""Who may be writing, and what a greeting proves. No input or output here.

A connection lives once: it is greeted, it may break, and it is never repaired. A sender says Hello on a new one only when
every write that it began on earlier ones has ended, and it numbers its greetings, so that a Hello that comes late proves
nothing about connections made after it.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from kv_transfer.protocol import SHM
from segue.errors import TransferRefused
from segue.v1 import transfer_pb2 as pb


class GreetedWriter(Protocol):
    """`number` is that of the Hello which made it known."""

    sender_id: int
    number: int
    transport: str


W = TypeVar("W", bound=GreetedWriter)


@dataclass(slots=True)
class Roster(Generic[W]):
    """The writers that a receiver has to reckon with. Whatever leaves it can write no more, or has no ticket."""

    connected: dict[bytes, W] = field(default_factory=dict)
    # Without a connection, but perhaps alive, and writing into shared memory.
    lost: list[W] = field(default_factory=list)

    def greet(self, connection: bytes, sender_id: int, number: int) -> list[W] | None:
        """A Hello. Returns the writers which have stopped, as it says; None when it is only repeated, or was overtaken by a
        later one: that one's writer may be writing."""
        same = [writer for writer in (*self.connected.values(), *self.lost) if writer.sender_id == sender_id]
        if any(writer.number >= number for writer in same):
            return None
        stopped = same + [writer for key, writer in self.connected.items() if key == connection and writer not in same]
        for writer in stopped:
            self.remove(writer)
        return stopped

    def add(self, connection: bytes, writer: W) -> None:
        self.connected[connection] = writer

    def lose(self, connection: bytes) -> W | None:
        """The connection is gone. Returns its writer, if it had one."""
        writer = self.connected.pop(connection, None)
        if writer is not None and writer.transport == SHM:
            self.lost.append(writer)
        return writer

    def remove(self, writer: W) -> None:
        """It is known to write no more."""
        self.connected = {key: other for key, other in self.connected.items() if other is not writer}
        self.lost = [other for other in self.lost if other is not writer]

    def forget_idle(self, busy: Container[object]) -> list[W]:
        """Removes and returns the lost writers that have no ticket (are not among `busy`)."""
        idle = [writer for writer in self.lost if writer not in busy]
        for writer in idle:
            self.remove(writer)
        return idle


def check_welcome(welcome: pb.Welcome, worker_id: str, epoch: int, offered: Sequence[str]) -> None:
    """Raises TransferRefused when the receiver does not want this pair, or is not the one that the ticket is of."""
    if welcome.refusal:
        raise TransferRefused(welcome.refusal)
    if (welcome.worker_id, welcome.epoch) != (worker_id, epoch):
        raise TransferRefused(
            f"the ticket is of {worker_id}, epoch {epoch}; in its place is {welcome.worker_id}, epoch {welcome.epoch}"
        )
    if welcome.transport not in offered:
        raise TransferRefused(f"{worker_id} chose the transport {welcome.transport!r}, which was not offered")
