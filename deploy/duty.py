"""What a worker is there for: its roles, and whether it takes new sequences. Operators change both, over any link.

    ready ──drain──► draining ──nothing left, or given up for other workers──► drained ──► stays, leaves, or is started anew
      ▲                 │                                                         │
      └──────undo───────┴─────────────────────────undo────────────────────────────┘

A role that was given is a lease: when it ends, the worker has its own roles again. It tells every router of each change.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from segue.config import Role, WorkerSettings
from segue.errors import WorkerLost
from segue.v1 import worker_pb2 as pb
from segue.worker_link import Leg

logger = logging.getLogger(__name__)


class Duty:
    def __init__(self, settings: WorkerSettings, legs: Sequence[Leg]) -> None:
        # Called after each change of what the worker's record says.
        self.on_change: Callable[[], None] = lambda: None
        self.roles: tuple[Role, ...] = settings.roles
        # Unix time; 0: for as long as the worker runs.
        self.roles_until_unix_s = 0.0
        self.draining = False
        # Done when the worker holds nothing any more and shall end.
        self.departure: asyncio.Future[pb.Departure.ValueType] = asyncio.get_running_loop().create_future()
        self._settings = settings
        self._legs = legs
        self._drain: asyncio.Task[None] | None = None
        self._lease_end: asyncio.TimerHandle | None = None

    def handle(self, message: pb.LinkRequest) -> None:
        """What an operator says; other messages are none of its business."""
        match message.WhichOneof("message"):
            case "drain" if message.drain.undo:
                self.take_back()
            case "drain":
                self.drain(message.drain.grace_ms / 1000, message.drain.departure)
            case "set_role":
                self.set_role(message.set_role.role, message.set_role.lease_ms / 1000)

    def set_role(self, role: str, lease_s: float) -> None:
        """Its own role is no lease. One that the worker cannot have is refused by routers, which know that from its record."""
        possible = next((known for known in self._settings.possible_roles if known == role), None)
        if possible is None:
            logger.warning("cannot be a %s worker: formats or ranks differ", role)
            return
        if self._lease_end is not None:
            self._lease_end.cancel()
        self._lease_end, self.roles_until_unix_s, self.roles = None, 0.0, (possible,)
        if (possible,) != self._settings.roles:
            self._lease_end = asyncio.get_running_loop().call_later(lease_s, self._end_lease)
            self.roles_until_unix_s = time.time() + lease_s
        logger.info("is a %s worker now%s", role, f", for {lease_s:g} s" if self._lease_end else "")
        self.on_change()

    def _end_lease(self) -> None:
        self._lease_end, self.roles_until_unix_s, self.roles = None, 0.0, self._settings.roles
        logger.info("the lease of its role has ended: is a %s worker again", " and ".join(self.roles))
        self.on_change()

    def drain(self, grace_s: float, departure: pb.Departure.ValueType) -> None:
        """Begins to; whatever was said of it before holds no more."""
        self._stop_draining()
        logger.info("draining: %d sequences to finish", sum(leg.num_sequences for leg in self._legs))
        self.draining = True
        self._drain = asyncio.create_task(self._finish(grace_s, departure))
        self.on_change()

    def take_back(self) -> None:
        """Takes new sequences again, unless it is too late."""
        if not self.departure.done():
            self._stop_draining()
            self.draining = False
            self.on_change()

    def _stop_draining(self) -> None:
        if self._drain is not None:
            self._drain.cancel()
            self._drain = None

    async def _finish(self, grace_s: float, departure: pb.Departure.ValueType) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await self._wait_empty()
        except TimeoutError:
            num_left = sum(leg.num_sequences for leg in self._legs)
            logger.info("giving up %d sequences, which go on on other workers", num_left)
            for leg in self._legs:
                leg.give_up(WorkerLost(f"worker {self._settings.worker_id} drains and gave the sequence up"))
            await self._wait_empty()
        logger.info("drained")
        if departure and not self.departure.done():
            self.departure.set_result(departure)

    async def _wait_empty(self) -> None:
        for leg in self._legs:
            await leg.wait_empty()

    def close(self) -> None:
        self._stop_draining()
        if self._lease_end is not None:
            self._lease_end.cancel()
