"""What may be sent to the workers now, what waits here, and what is refused at once.

    arrives → refused, told when to come again | waits, in a fair order → its turn → sent to workers → over

Workers are given only what they can begin with soon: more would merely wait where it can neither be ordered nor taken back. The
rest waits here. A request whose turn would come too late is refused when it arrives, not when it has waited.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np

from router.fair_queue import FairQueue, Waiting
from router.fleet import Fleet
from router.policies import prefill_ms_per_token
from router.sequence import SequenceRequest
from segue.errors import DeadlineExceeded, Overloaded
from segue.trend import Trend

# So much prefill work may lie ahead on a worker, and so many sequences may wait for their ticket on one: enough that it never
# waits for the router.
_AHEAD_MS = 100.0
_MAX_UNRESERVED = 4
# Tokens that are generated cost more than those of a prompt (Sheng et al.).
_OUTPUT_WEIGHT = 2.0
_FIRST_RETRY_S = 1.0


class Slot:
    """The place of an admitted sequence."""

    def __init__(self, queue: FairQueue[asyncio.Event], tenant: str) -> None:
        self._queue = queue
        self._tenant = tenant

    def generated(self, num_tokens: int) -> None:
        self._queue.pay(self._tenant, _OUTPUT_WEIGHT * num_tokens)


class Admission:
    def __init__(self, fleet: Fleet, *, max_active: int, max_waiting: int, max_wait_s: float) -> None:
        self._fleet = fleet
        self._max_active = max_active
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._queue: FairQueue[asyncio.Event] = FairQueue()
        self.num_active = 0
        # Seconds between two admissions by the tokens of the first. Room comes in bursts: many gaps of nothing and a long one
        # are one pace.
        self._pace = Trend(most_times_expected=None)
        # When the last admission was, and its tokens; None if there has been room since, so that nothing is learned.
        self._last: tuple[float, int] | None = None
        self._is_pumping = False
        fleet.on_change = self._pump_soon

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def admitted(self, request: SequenceRequest, deadline_s: float) -> AsyncIterator[Slot]:
        """Waits for the request's turn; it is in until the block ends. Raises Overloaded at once when that would take too long,
        DeadlineExceeded as soon as `deadline_s`, on the loop's clock, has passed."""
        caller, cost = request.caller, len(request.prompt_token_ids)
        self._refuse_if_hopeless(request, deadline_s)
        if not self._queue and self._has_room():
            self._last = None
        waiting = Waiting(asyncio.Event(), caller.tenant, caller.priority, cost)
        self._queue.push(waiting, caller.weight)
        self._pump()
        try:
            async with asyncio.timeout_at(deadline_s):
                await waiting.entry.wait()
        except BaseException as error:
            self._give_up(waiting)
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the request's turn did not come within the time allowed") from None
            raise
        try:
            yield Slot(self._queue, caller.tenant)
        finally:
            self._leave(caller.tenant)

    def _give_up(self, waiting: Waiting[asyncio.Event]) -> None:
        """Its turn may have come in this very moment, before or after what made it give up."""
        if waiting.entry.is_set():
            self._leave(waiting.tenant)
        else:
            self._queue.remove(waiting)

    def _leave(self, tenant: str) -> None:
        self._queue.end(tenant)
        self.num_active -= 1
        self._pump_soon()

    def predicted_wait_s(self, request: SequenceRequest) -> float:
        """Until the request's turn, were it to come now; as fast as turns came lately, or as workers can compute prompts."""
        ahead = self._queue.cost_ahead(request.caller.tenant, request.caller.priority)
        return ahead * (self._pace.ratio or self._seconds_per_token())

    def _seconds_per_token(self) -> float:
        columns = self._fleet.columns
        rates = 1 / prefill_ms_per_token(columns)[columns["available"] & columns["prefills"]]
        return float(1 / (1000 * rates.sum())) if rates.size else 0.0

    def _refuse_if_hopeless(self, request: SequenceRequest, deadline_s: float) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s >= deadline_s:
            raise DeadlineExceeded("the time allowed was over before the request began")
        wait_s = self.predicted_wait_s(request)
        if len(self._queue) >= self._max_waiting:
            raise Overloaded(f"{len(self._queue)} requests wait; try again later", retry_after_s=max(wait_s, _FIRST_RETRY_S))
        allowed_s = min(self._max_wait_s, deadline_s - now_s)
        if wait_s > allowed_s:
            raise Overloaded(
                f"the request would wait {wait_s:.1f} s for its turn, {allowed_s:.1f} s are allowed; try again later",
                retry_after_s=max(wait_s - allowed_s, _FIRST_RETRY_S),
            )

    def _pump_soon(self) -> None:
        """After all that is scheduled now: what was admitted last has then been charged to its workers."""
        if self._queue and not self._is_pumping:
            self._is_pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Lets the next one in, if there is room."""
        self._is_pumping = False
        if not self._queue or not self._has_room():
            return
        waiting = self._queue.pop()
        now_s = asyncio.get_running_loop().time()
        if self._last is not None:
            last_s, last_cost = self._last
            self._pace.add(last_cost, now_s - last_s)
        self._last = (now_s, waiting.cost)
        self.num_active += 1
        waiting.entry.set()
        self._pump_soon()

    def _has_room(self) -> bool:
        """Whether one more may run, and some worker of each role can begin with more soon. Without any worker there is nothing
        to wait for here."""
        if self.num_active >= self._max_active:
            return False
        columns = self._fleet.columns
        prefills, decodes = columns["available"] & columns["prefills"], columns["available"] & columns["decodes"]
        if not prefills.any() or not decodes.any():
            return True
        ahead_ms = columns["queued_tokens"] * prefill_ms_per_token(columns)
        return bool(np.any(prefills & (ahead_ms < _AHEAD_MS)) and np.any(decodes & (columns["unreserved"] < _MAX_UNRESERVED)))
