"""One try to serve a sequence on one pair of workers: what is said to them, and what their answers mean."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from router.placement import Placed
from router.sequence import SequencePath, SequenceRequest, TokenStep, attempt_name
from router.workers import LineEvent
from segue.errors import DeadlineExceeded, SegueError
from segue.lifecycle import Phase
from segue.tracing import TraceContext
from segue.v1 import worker_pb2
from segue.wire import finish_reason_from_pb, sampling_to_pb, token_from_pb


class Attempt:
    """`token_ids` are the prompt and what was generated of the answer in earlier attempts; `deadline_s` is on the loop's
    clock; `trace` is of the request."""

    def __init__(
        self,
        request: SequenceRequest,
        token_ids: tuple[int, ...],
        placed: Placed,
        path: SequencePath,
        deadline_s: float,
        trace: TraceContext | None = None,
    ) -> None:
        self._request = request
        self._token_ids = token_ids
        self._placed = placed
        self._prefill = placed.prefill
        self._decode = placed.decode
        self._path = path
        self._deadline_s = deadline_s
        self._key = worker_pb2.SequenceKey(sequence_id=request.sequence_id, attempt=path.attempts)
        span = None if trace is None else trace.child(attempt_name(request.sequence_id, path.attempts))
        self._traceparent = "" if span is None else span.traceparent
        self._events: asyncio.Queue[LineEvent] = asyncio.Queue()
        # The workers' links are two streams: decode tokens may overtake the first token, and wait for it here.
        self._first_token_s: float | None = None
        self._held_back: list[TokenStep] = []
        self._decode_has_it = False
        self._num_output_tokens = len(token_ids) - len(request.prompt_token_ids)
        self._hands_over = request.sampling.max_tokens - self._num_output_tokens > 1

    @contextmanager
    def lines(self) -> Iterator[None]:
        """Hears both workers and the deadline until the block ends; what is left of the sequence there is cancelled then."""
        late = LineEvent(self._decode, DeadlineExceeded("the request was not finished within the time allowed"))
        with ExitStack() as stack:
            # One timer for all events, not one for each.
            stack.callback(asyncio.get_running_loop().call_at(self._deadline_s, self._events.put_nowait, late).cancel)
            stack.enter_context(self._prefill.line(self._key, self._events))
            if self._hands_over and self._decode is not self._prefill:
                stack.enter_context(self._decode.line(self._key, self._events))
            yield

    def dispatch(self) -> None:
        """Starts both legs at once."""
        sampling, salt = sampling_to_pb(self._request.sampling), self._request.caller.cache_salt
        self._path.prefill_worker = self._prefill.record.worker_id
        self._path.decode_worker = self._decode.record.worker_id if self._hands_over else ""
        self._path.transport = "none"
        self._path.placement = self._placed.reason
        self._path.prefill_queue_s = self._path.transfer_hidden_s = 0.0
        self._path.lifecycle.enter(Phase.RESERVED)
        if not self._hands_over:
            self._placed.reserved()
        else:
            reserve = worker_pb2.ReserveDecode(
                key=self._key,
                token_ids=self._token_ids,
                sampling=sampling,
                prefill_worker_id=self._path.prefill_worker,
                num_prefill_ranks=self._prefill.record.num_ranks,
                num_output_tokens=self._num_output_tokens,
                cache_salt=salt,
                traceparent=self._traceparent,
            )
            self._decode.send(worker_pb2.LinkRequest(reserve_decode=reserve))
        start = worker_pb2.StartPrefill(
            key=self._key,
            token_ids=self._token_ids,
            sampling=sampling,
            hand_over=self._hands_over,
            num_decode_ranks=self._decode.record.num_ranks,
            num_output_tokens=self._num_output_tokens,
            cache_salt=salt,
            traceparent=self._traceparent,
        )
        self._prefill.send(worker_pb2.LinkRequest(start_prefill=start))

    async def next_steps(self) -> list[TokenStep]:
        """Waits for a worker to say something; gives the steps that can go to the client now, often none. Raises the error
        that ends the attempt: DeadlineExceeded when the time allowed is over."""
        event = await self._events.get()
        said = event.said
        if isinstance(said, SegueError):
            if self._decode_has_it and event.link is not self._decode:
                return []  # decode holds the whole KV cache: what becomes of prefill no longer matters
            raise said
        if isinstance(said, worker_pb2.SequenceTokens):
            tokens = tuple(token_from_pb(token) for token in said.tokens)
            return self._in_order([TokenStep(tokens, finish_reason_from_pb(said.finish_reason))])
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
        return []

    def _attach_tickets(self, reserved: worker_pb2.DecodeReserved) -> None:
        attach = worker_pb2.AttachTickets(key=self._key, tickets=reserved.tickets)
        self._prefill.send(worker_pb2.LinkRequest(attach_tickets=attach))
        self._placed.reserved()
        if self._path.lifecycle.phase is Phase.RESERVED:
            self._path.lifecycle.enter(Phase.PREFILLING)

    def _first_token(self, first: worker_pb2.FirstToken) -> list[TokenStep]:
        self._placed.end_prefill()
        self._path.prefill_cached_tokens = first.cached_tokens
        self._path.prefill_pulled_tokens = first.pulled_tokens
        self._path.prefill_queue_s, self._path.transfer_hidden_s = first.queue_s, first.sending_s
        self._path.lifecycle.enter(Phase.TRANSFERRING)
        self._first_token_s = asyncio.get_running_loop().time()
        self._enter_decoding()
        step = TokenStep((token_from_pb(first.token),), finish_reason_from_pb(first.finish_reason))
        held_back, self._held_back = self._held_back, []
        return self._in_order([step, *held_back])

    def _decode_started(self, started: worker_pb2.DecodeStarted) -> None:
        self._path.decode_cached_tokens = started.cached_tokens
        self._path.transferred_bytes = started.transferred_bytes
        self._path.transport = started.transport
        self._decode_has_it = True
        now_s = asyncio.get_running_loop().time()
        num_sent = len(self._token_ids) - started.cached_tokens
        self._placed.handed_over(num_sent, started.transferred_bytes, now_s - (self._first_token_s or now_s))
        self._enter_decoding()

    def _enter_decoding(self) -> None:
        if self._decode_has_it and self._path.lifecycle.phase is Phase.TRANSFERRING:
            self._path.lifecycle.enter(Phase.DECODING)

    def _in_order(self, steps: list[TokenStep]) -> list[TokenStep]:
        if self._first_token_s is None:
            self._held_back += steps
            return []
        if steps[-1].finish_reason is not None:
            self._path.lifecycle.enter(Phase.FINISHED)
        return steps
