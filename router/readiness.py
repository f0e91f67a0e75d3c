"""Whether a request sent now would be answered: found out by sending one, not by a ping.

    a role has no live worker              → not ready
    a token was decoded in the last second → ready: that is proof enough
    otherwise                              → a canary of one prompt token and two output tokens goes all the way

One canary runs at a time, for all who ask; its result holds for a second.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from router.sequence import SequencePath, SequenceRequest, SequenceServer
from segue.errors import SegueError
from segue.sampling import SamplingParams
from segue.tracing import CURRENT_TRACE

FRESH_S = 1.0
CANARY_LIMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class ReadinessReport:
    ready: bool
    reason: str
    missing_roles: tuple[str, ...] = ()


class Readiness:
    """`async with` ends a canary that is still under way on leaving."""

    def __init__(
        self,
        server: SequenceServer,
        canary_token_id: int,
        last_decoded_s: Callable[[], float | None],
        clock: Callable[[], float],
        *,
        canary_limit_s: float = CANARY_LIMIT_S,
    ) -> None:
        """`last_decoded_s` says when, on `clock`, a request last got a token from a decode worker."""
        self._server = server
        self._canary_token_id = canary_token_id
        self._last_decoded_s = last_decoded_s
        self._clock = clock
        self._canary_limit_s = canary_limit_s
        self._canary: asyncio.Task[ReadinessReport] | None = None
        self._last: tuple[float, ReadinessReport] | None = None
        self.is_draining = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._canary is not None:
            self._canary.cancel()
            await asyncio.wait([self._canary])

    def drain(self) -> None:
        """From now on not ready: no new requests are wanted."""
        self.is_draining = True

    async def check(self) -> ReadinessReport:
        if self.is_draining:
            return ReadinessReport(False, "this router is shutting down")
        if missing := self._server.missing_roles():
            return ReadinessReport(False, f"no live worker for {' and '.join(missing)}", tuple(missing))
        if self._is_fresh(self._last_decoded_s()):
            return ReadinessReport(True, "requests are being answered")
        if self._last is not None and self._is_fresh(self._last[0]):
            return self._last[1]
        if self._canary is None or self._canary.done():
            self._canary = asyncio.create_task(self._run_canary())
        # One caller that goes away must not take the canary from the others.
        return await asyncio.shield(self._canary)

    def _is_fresh(self, moment_s: float | None) -> bool:
        return moment_s is not None and self._clock() - moment_s <= FRESH_S

    async def _run_canary(self) -> ReadinessReport:
        # Nobody asked for it: it is in no trace, even where the one who asks for readiness is.
        CURRENT_TRACE.set(None)
        report = await self._send_canary()
        self._last = (self._clock(), report)
        return report

    async def _send_canary(self) -> ReadinessReport:
        request = SequenceRequest(
            sequence_id=f"canary-{secrets.token_hex(8)}",
            prompt_token_ids=(self._canary_token_id,),
            # The second token is the first that decode makes.
            sampling=SamplingParams(max_tokens=2, min_tokens=2, temperature=0.0),
        )
        try:
            async with asyncio.timeout(self._canary_limit_s):
                async with aclosing(self._server.serve(request, SequencePath())) as steps:
                    num_tokens = sum([len(step.tokens) async for step in steps])
        except TimeoutError:
            return ReadinessReport(False, f"a canary request got no answer within {self._canary_limit_s:g} s")
        except SegueError as error:
            return ReadinessReport(False, f"a canary request failed: {error.message}")
        if num_tokens < 2:
            return ReadinessReport(False, f"a canary request got {num_tokens} of 2 tokens")
        return ReadinessReport(True, "a canary request was answered")
