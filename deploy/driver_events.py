"""What the Ray driver says of itself and its replicas (see deploy.ray_driver), as the launcher hears it."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from deploy.child import FirstWord, parse_event
from segue.errors import SegueError, error_from_code


class DriverEvents:
    """`on_line` takes the driver's output; `first_word` tells when Ray runs; ended replicas wait to be asked for."""

    def __init__(self) -> None:
        self.first_word = FirstWord()
        # Worker id, and the error it ended with; None for one that drained.
        self._ended: asyncio.Queue[tuple[str, SegueError | None]] = asyncio.Queue()

    def on_line(self, line: str) -> None:
        self.first_word.on_line(line)
        if (event := parse_event(line)) is not None and event["event"] == "replica_ended":
            worker_id = str(event["worker_id"])
            error = None if event["drained"] else error_from_code(event["code"], f"{worker_id}: {event['error']}")
            self._ended.put_nowait((worker_id, error))

    async def next_ended(self) -> tuple[str, SegueError | None]:
        """The next replica whose run ended, and why; None if it drained."""
        return await self._ended.get()

    async def raise_failures(self) -> NoReturn:
        """For the time of the start, when a replica that ends cannot be gone without."""
        while True:
            worker_id, error = await self.next_ended()
            raise error or error_from_code("unavailable", f"{worker_id} was told to leave while the cluster started")
