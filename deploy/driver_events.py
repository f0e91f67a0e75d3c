"""What the Ray driver says of itself and its replicas (see deploy.ray_driver), as the launcher hears it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import NoReturn

from deploy.child import FirstWord, parse_event
from segue.errors import SegueError, error_from_code


@dataclass(frozen=True, slots=True)
class ReplicaEnded:
    worker_id: str
    # None for one that drained.
    error: SegueError | None
    # It is started anew.
    again: bool

    def note(self) -> str:
        """In one line."""
        if self.error is not None:
            return f"{self.error.message.splitlines()[0]}; starting it again"
        return f"{self.worker_id} drained and {'is started anew' if self.again else 'left'}"


class DriverEvents:
    """`on_line` takes the driver's output; `first_word` tells when Ray runs; ended replicas wait to be asked for; `problem` is
    what workers wait for, empty if Ray has room for all."""

    def __init__(self) -> None:
        self.problem = ""
        self.first_word = FirstWord()
        self._ended: asyncio.Queue[ReplicaEnded] = asyncio.Queue()

    def on_line(self, line: str) -> None:
        self.first_word.on_line(line)
        if (event := parse_event(line)) is None:
            return
        if event["event"] == "room":
            self.problem = str(event["problem"])
        elif event["event"] == "replica_ended":
            worker_id = str(event["worker_id"])
            error = None if event["drained"] else error_from_code(event["code"], f"{worker_id}: {event['error']}")
            self._ended.put_nowait(ReplicaEnded(worker_id, error, bool(event["again"])))

    async def next_ended(self) -> ReplicaEnded:
        """The next replica whose run ended."""
        return await self._ended.get()

    async def raise_failures(self) -> NoReturn:
        """For the time of the start, when a replica that ends cannot be gone without."""
        ended = await self.next_ended()
        raise ended.error or error_from_code("unavailable", f"{ended.worker_id} was told to leave while the cluster started")
