"""Serves one sequence: the whole of a request's way through the cluster, read from top to bottom.

    place → reserve on decode (ticket) ∥ start prefill → first token to the client → receipt → decode tokens → release

Both legs are dispatched at once; the ticket is forwarded to prefill as soon as decode grants it. Whatever ends the sequence,
leaving `serve` cancels on both workers what is left of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from importlib.metadata import version

from router.placement import Policy, least_loaded, place
from router.sequence import SequencePath, SequenceRequest, TokenStep
from router.workers import LineEvent, WorkerLink, Workers
from segue.errors import DeadlineExceeded, Overloaded, SegueError
from segue.lifecycle import Phase
from segue.v1 import inference_pb2, worker_pb2
from segue.wire import finish_reason_from_pb, sampling_to_pb, token_from_pb


class Coordinator:
    """The router's core; implements router.sequence.SequenceServer."""

    def __init__(
        self,
        workers: Workers,
        model_name: str,
        *,
        max_active: int,
        timeout_s: float,
        policy: Policy = least_loaded,
    ) -> None:
        self._workers = workers
        self._model_name = model_name
        self._max_active = max_active
        self._timeout_s = timeout_s
        self._policy = policy
        self._num_active = 0

    async def serve(self, request: SequenceRequest, path: SequencePath) -> AsyncGenerator[TokenStep, None]:
        """See SequenceServer.serve."""
        try:
            with self._admitted(), self._placed(request, path) as attempt, attempt.lines():
                attempt.dispatch()
                while not path.lifecycle.is_over:
                    for step in attempt.hear(await attempt.next_event()):
                        yield step
        except SegueError:
            path.lifecycle.enter(Phase.FAILED)
            raise
        finally:
            if not path.lifecycle.is_over:
                path.lifecycle.enter(Phase.CANCELLED)

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._num_active >= self._max_active:
            raise Overloaded(f"{self._num_active} requests are being served; try again later")
        self._num_active += 1
        try:
            yield
        finally:
            self._num_active -= 1

    @contextmanager
    def _placed(self, request: SequenceRequest, path: SequencePath) -> Iterator[_Attempt]:
        """Chooses a pair of workers and charges it until the block ends."""
        links = {link.record.worker_id: link for link in self._workers.available()}
        num_prompt_tokens, max_tokens = len(request.prompt_token_ids), request.sampling.max_tokens
        facts = [link.facts() for link in links.values()]
        chosen = place(facts, num_prompt_tokens, max_tokens, self._policy)
        prefill, decode = (links[worker.worker_id] for worker in chosen)
        prefill.prefill_tokens += num_prompt_tokens
        decode.decode_sequences += 1
        attempt = _Attempt(request, prefill, decode, path, deadline_s=asyncio.get_running_loop().time() + self._timeout_s)
        try:
            yield attempt
        finally:
            decode.decode_sequences -= 1
            attempt.end_prefill_charge()

    def status(self) -> inference_pb2.GetClusterStatusResponse:
        return inference_pb2.GetClusterStatusResponse(
            model=self._model_name,
            workers=[link.status() for link in self._workers.all()],
            active_requests=self._num_active,
            membership_fresh=self._workers.membership_fresh,
            version=version("segue"),
        )

    def missing_roles(self) -> list[str]:
        roles = {role for link in self._workers.available() for role in link.record.roles}
        return [role for role in ("prefill", "decode") if role not in roles]

    @property
    def max_sequence_tokens(self) -> int | None:
        capacity = [link.facts().capacity_tokens for link in self._workers.available() if "decode" in link.record.roles]
        return max(capacity, default=None)


class _Attempt:
    """One try to serve a sequence on one pair of workers."""

    def __init__(
        self, request: SequenceRequest, prefill: WorkerLink, decode: WorkerLink, path: SequencePath, *, deadline_s: float
    ) -> None:
        self._request = request
        self._prefill = prefill
        self._decode = decode
        self._path = path
        # On the loop's clock.
        self._deadline_s = deadline_s
        self._key = worker_pb2.SequenceKey(sequence_id=request.sequence_id, attempt=path.attempts)
        self._events: asyncio.Queue[LineEvent] = asyncio.Queue()
        # The workers' links are two streams: decode tokens may overtake the first token, and wait for it here.
        self._first_token_is_out = False
        self._held_back: list[TokenStep] = []
        self._is_charged_to_prefill = True
        self._decode_has_it = False

    @property
    def _hands_over(self) -> bool:
        return self._request.sampling.max_tokens > 1

    @contextmanager
    def lines(self) -> Iterator[None]:
        with self._prefill.line(self._key, self._events):
            if self._hands_over and self._decode is not self._prefill:
                with self._decode.line(self._key, self._events):
                    yield
            else:
                yield

    def dispatch(self) -> None:
        """Starts both legs at once."""
        token_ids, sampling = self._request.prompt_token_ids, sampling_to_pb(self._request.sampling)
        self._path.prefill_worker = self._prefill.record.worker_id
        self._path.lifecycle.enter(Phase.RESERVED)
        if self._hands_over:
            self._path.decode_worker = self._decode.record.worker_id
            reserve = worker_pb2.ReserveDecode(
                key=self._key,
                token_ids=token_ids,
                sampling=sampling,
                prefill_worker_id=self._path.prefill_worker,
                num_prefill_ranks=self._prefill.record.num_ranks,
            )
            self._decode.send(worker_pb2.LinkRequest(reserve_decode=reserve))
        start = worker_pb2.StartPrefill(
            key=self._key,
            token_ids=token_ids,
            sampling=sampling,
            hand_over=self._hands_over,
            num_decode_ranks=self._decode.record.num_ranks,
        )
        self._prefill.send(worker_pb2.LinkRequest(start_prefill=start))

    async def next_event(self) -> LineEvent:
        try:
            async with asyncio.timeout_at(self._deadline_s):
                return await self._events.get()
        except TimeoutError:
            raise DeadlineExceeded("the request was not finished within the time allowed") from None

    def hear(self, event: LineEvent) -> list[TokenStep]:
        """Takes the next event; gives the steps that can go to the client now. Raises the error that ends the sequence."""
        said = event.said
        if isinstance(said, SegueError):
            if self._decode_has_it and event.link is not self._decode:
                return []  # decode holds the whole KV cache: what becomes of prefill no longer matters
            raise said
        match said.WhichOneof("message"):
            case "decode_reserved":
                self._attach_tickets(said.decode_reserved)
            case "pull_kv":
                send = worker_pb2.SendKV(key=self._key, tickets=said.pull_kv.tickets)
                self._decode.send(worker_pb2.LinkRequest(send_kv=send))
            case "first_token":
                return self._first_token(said.first_token)
            case "decode_started":
                self._decode_started(said.decode_started)
            case "step_tokens":
                (sequence,) = said.step_tokens.sequences
                step = TokenStep(
                    tokens=tuple(token_from_pb(token) for token in sequence.tokens),
                    finish_reason=finish_reason_from_pb(sequence.finish_reason),
                )
                return self._in_order([step])
        return []

    def end_prefill_charge(self) -> None:
        if self._is_charged_to_prefill:
            self._prefill.prefill_tokens -= len(self._request.prompt_token_ids)
            self._is_charged_to_prefill = False

    def _attach_tickets(self, reserved: worker_pb2.DecodeReserved) -> None:
        attach = worker_pb2.AttachTickets(key=self._key, tickets=reserved.tickets)
        self._prefill.send(worker_pb2.LinkRequest(attach_tickets=attach))
        if self._path.lifecycle.phase is Phase.RESERVED:
            self._path.lifecycle.enter(Phase.PREFILLING)

    def _first_token(self, first: worker_pb2.FirstToken) -> list[TokenStep]:
        self.end_prefill_charge()
        self._path.prefill_cached_tokens = first.cached_tokens
        self._path.prefill_pulled_tokens = first.pulled_tokens
        self._path.lifecycle.enter(Phase.TRANSFERRING)
        self._first_token_is_out = True
        self._enter_decoding()
        step = TokenStep((token_from_pb(first.token),), finish_reason_from_pb(first.finish_reason))
        held_back, self._held_back = self._held_back, []
        return self._in_order([step, *held_back])

    def _decode_started(self, started: worker_pb2.DecodeStarted) -> None:
        self._path.decode_cached_tokens = started.cached_tokens
        self._path.transferred_bytes = started.transferred_bytes
        self._path.transport = started.transport
        self._decode_has_it = True
        self._enter_decoding()

    def _enter_decoding(self) -> None:
        if self._decode_has_it and self._path.lifecycle.phase is Phase.TRANSFERRING:
            self._path.lifecycle.enter(Phase.DECODING)

    def _in_order(self, steps: list[TokenStep]) -> list[TokenStep]:
        if not self._first_token_is_out:
            self._held_back += steps
            return []
        if steps[-1].finish_reason is not None:
            self._path.lifecycle.enter(Phase.FINISHED)
        return steps
