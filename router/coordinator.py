"""Serves one sequence: the whole of a request's way through the cluster, read from top to bottom.

    wait → place → reserve on decode (ticket) ∥ start prefill → first token to the client → receipt → decode tokens → release
      ↑                                                                                                         │
      └── a worker is lost, hangs, or a hand-over fails: prompt + tokens so far, on other workers ←─────────────┘

Both legs are dispatched at once; the ticket is forwarded to prefill as soon as decode grants it. Whatever ends an attempt
cancels on both workers what is left of it. The client sees one stream of tokens, whichever attempts made them: sampling depends
on the tokens and (seed, position) alone, so that another pair of workers goes on exactly where the first one stopped.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from importlib.metadata import version

from router.admission import Admission
from router.attempt import Attempt
from router.placement import Placed, Placement, Wanted
from router.sequence import FailedAttempt, SequencePath, SequenceRequest, TokenStep
from router.workers import Workers
from segue.errors import NoWorker, SegueError, TransferError, error_from_code
from segue.lifecycle import Phase
from segue.tracing import CURRENT_TRACE
from segue.v1 import inference_pb2

logger = logging.getLogger(__name__)

# A worker that died is started again. How long a sequence waits for that when no other has the role, from the moment at which
# one was last there: one that lost its worker, and one that has not begun.
FAILOVER_PATIENCE_S = 60.0
ARRIVAL_PATIENCE_S = 10.0


@dataclass(slots=True)
class _Serving:
    """A sequence as far as it has come."""

    request: SequenceRequest
    path: SequencePath
    # On the loop's clock.
    deadline_s: float
    # The prompt and the answer so far.
    token_ids: list[int]
    # Workers of failed hand-overs, of which one is at fault.
    suspects: set[str] = field(default_factory=set)

    def wanted(self) -> Wanted:
        num_tokens_left = len(self.request.prompt_token_ids) + self.request.sampling.max_tokens - len(self.token_ids)
        return Wanted(self.token_ids, num_tokens_left, self.request.caller.cache_salt, self.suspects)


class Coordinator:
    """The router's core; implements router.sequence.SequenceServer."""

    def __init__(
        self,
        workers: Workers,
        placement: Placement,
        admission: Admission,
        model_name: str,
        *,
        max_attempts: int,
        timeout_s: float,
    ) -> None:
        self._workers = workers
        self._placement = placement
        self._admission = admission
        self._model_name = model_name
        self._max_attempts = max_attempts
        self._timeout_s = timeout_s

    async def serve(self, request: SequenceRequest, path: SequencePath) -> AsyncGenerator[TokenStep, None]:
        """See SequenceServer.serve."""
        try:
            serving = self._begin(request, path)
            async with self._admission.admitted(request, serving.deadline_s) as slot:
                while not path.lifecycle.is_over:
                    placed = await self._place(serving)
                    try:
                        trace, token_ids = CURRENT_TRACE.get(), tuple(serving.token_ids)
                        attempt = Attempt(request, token_ids, placed, path, serving.deadline_s, trace)
                        with placed, attempt.lines():
                            attempt.dispatch()
                            while not path.lifecycle.is_over:
                                for step in await attempt.next_steps():
                                    serving.token_ids += [token.token_id for token in step.tokens]
                                    slot.generated(len(step.tokens))
                                    yield step
                    except SegueError as error:
                        self._fail_over(error, serving)
                self._placement.learn_length(len(serving.token_ids) - len(request.prompt_token_ids))
        except SegueError as error:
            path.error = error
            path.lifecycle.enter(Phase.FAILED)
            raise
        finally:
            if not path.lifecycle.is_over:
                path.lifecycle.enter(Phase.CANCELLED)

    def _begin(self, request: SequenceRequest, path: SequencePath) -> _Serving:
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s
        if request.deadline_s is not None:
            deadline_s = min(deadline_s, request.deadline_s)
        return _Serving(request, path, deadline_s, [*request.prompt_token_ids, *request.output_token_ids])

    async def _place(self, serving: _Serving) -> Placed:
        """The pair of workers that shall serve the sequence. Where there is none, but was a moment ago, waits for it to come
        back. Raises NoWorker."""
        patience_s = FAILOVER_PATIENCE_S if serving.path.failed_attempts else ARRIVAL_PATIENCE_S
        limit_s = min(serving.deadline_s, self._workers.last_complete_s + patience_s)
        with self._workers.changed.listening() as changed:
            while True:
                try:
                    return self._placement.place(serving.wanted())
                except NoWorker as error:
                    try:
                        async with asyncio.timeout_at(limit_s):
                            await changed.wait()
                    except TimeoutError:
                        raise error from None
                    changed.clear()

    def _fail_over(self, error: SegueError, serving: _Serving) -> None:
        """Prepares another attempt. Raises `error` when it cannot help, or too many have failed."""
        path = serving.path
        if not error.retryable:
            raise error
        if path.attempts >= self._max_attempts:
            raise error_from_code(error.code, f"all {path.attempts} attempts failed, the last one: {error.message}") from error
        sequence_id = serving.request.sequence_id
        logger.info(
            "%s: attempt %d failed, trying others: %s",
            sequence_id,
            path.attempts,
            error.message,
            extra={"sequence_id": sequence_id},
        )
        if isinstance(error, TransferError):
            serving.suspects |= {path.prefill_worker, path.decode_worker}
        path.failed_attempts.append(FailedAttempt(path.prefill_worker, path.decode_worker, error))
        path.lifecycle.enter(Phase.QUEUED)

    def status(self) -> inference_pb2.GetClusterStatusResponse:
        return inference_pb2.GetClusterStatusResponse(
            model=self._model_name,
            workers=[link.status() for link in self._workers.all()],
            active_requests=self._admission.num_active + self._admission.num_waiting,
            membership_fresh=self._workers.membership_fresh,
            version=version("segue"),
            routers=[
                inference_pb2.RouterStatus(
                    router_id=router.router_id,
                    grpc_address=router.grpc_address,
                    http_address=router.http_address,
                    pid=router.pid,
                    host=router.host,
                )
                for router in self._workers.routers
            ],
            waiting_requests=self._admission.num_waiting,
            transfers=self._placement.transfers.to_pb(),
        )

    def missing_roles(self) -> list[str]:
        return self._workers.missing_roles()

    @property
    def max_sequence_tokens(self) -> int | None:
        capacity = [link.capacity_tokens for link in self._workers.available() if "decode" in link.record.roles]
        return max(capacity, default=None)
