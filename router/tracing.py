"""The router's part of a request's trace, made from its record when it is over: exact times, and no work before that.

request (server) ─┬─ attempt 1 ─┬─ queue, reserve, prefill, transfer, decode
                  └─ attempt 2 …└─ the workers' own spans, which know the attempt's from its traceparent
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

from router.records import RequestRecord
from router.sequence import SequencePath, attempt_name
from router.timeline import AttemptTiming, attempt_timings
from segue.tracing import Span, Spans, TraceContext


class RequestTracing:
    def __init__(self, spans: Spans, ratio: float) -> None:
        self._spans = spans
        self._ratio = ratio

    def arrived(self, traceparent: str | None) -> TraceContext | None:
        """The span of a request that came with this header. A caller's trace goes on, and its word on sampling holds."""
        parent = TraceContext.parse(traceparent) if traceparent else None
        if not self._spans.are_wanted:
            return parent
        return TraceContext.begin(self._ratio) if parent is None else parent.child(secrets.token_hex(8))

    def over(self, record: RequestRecord) -> None:
        if self._spans.are_wanted and record.trace is not None and record.trace.sampled:
            for span in request_spans(record, time.time(), time.monotonic()):
                self._spans.add(span)


def request_spans(record: RequestRecord, now_unix_s: float, now_s: float) -> Iterator[Span]:
    """All of a request that is over. `now_unix_s` and `now_s`, the latter on the sequences' clock, are the same moment."""
    request = record.trace
    if request is None:
        return
    failure = record.failure
    yield Span(
        record.api,
        request,
        record.arrived_unix_s,
        now_unix_s,
        {
            "segue.request_id": record.request_id,
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.output_tokens": record.num_output_tokens,
        },
        failure.message if failure is not None else "",
        kind="server",
    )
    for sequence_id, path in record.paths.items():
        yield from _attempts(request, sequence_id, path, now_unix_s, now_s)


def _attempts(request: TraceContext, sequence_id: str, path: SequencePath, now_unix_s: float, now_s: float) -> Iterator[Span]:
    begun_unix_s = now_unix_s - (now_s - path.begun_s)
    last = (path.prefill_worker, path.decode_worker, path.error)
    ways = [*((failed.prefill_worker, failed.decode_worker, failed.error) for failed in path.failed_attempts), last]
    timings = attempt_timings(path.lifecycle.history, now_s)
    for number, (timing, (prefill, decode, error)) in enumerate(zip(timings, ways, strict=True), start=1):
        context, start_s = request.child(attempt_name(sequence_id, number)), begun_unix_s + timing.start_s
        attributes: dict[str, str | int | float] = {
            "segue.sequence_id": sequence_id,
            "segue.attempt": number,
            "segue.prefill_worker": prefill,
            "segue.decode_worker": decode,
        }
        phases = list(_phases(timing))
        end_s = start_s + max(end for _, _, end in phases)
        yield Span("attempt", context, start_s, end_s, attributes, error.message if error is not None else "")
        for name, start, end in phases:
            if end > start:
                yield Span(name, context.child(name), start_s + start, start_s + end)


def _phases(timing: AttemptTiming) -> Iterator[tuple[str, float, float]]:
    """(name, start, end) in seconds from the attempt's start."""
    dispatched_s = timing.queue_s
    first_token_s = dispatched_s + timing.prefill_s
    decoding_s = first_token_s + timing.exposed_s
    yield "queue", 0.0, dispatched_s
    yield "reserve", dispatched_s, dispatched_s + timing.reserve_s
    yield "prefill", dispatched_s, first_token_s
    yield "transfer", first_token_s, decoding_s
    yield "decode", decoding_s, decoding_s + timing.decode_s
