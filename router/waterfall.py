"""A choice's way as stretches of time, for whoever draws it: `segue explain`, `segue top`, the console."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from segue.v1.inference_pb2 import Attempt, RequestPath


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds from the request's start. Up to `split_s` it is drawn light: a prompt that waits, a transfer that is hidden."""

    name: str
    start_s: float
    end_s: float
    split_s: float
    note: str = ""


def spans_of(path: RequestPath) -> Iterator[Span]:
    """What has not come to pass has none."""
    for number, attempt in enumerate(path.timeline, start=1):
        begin_s = path.start_s + attempt.start_s
        prefix = f"{number}. " if len(path.timeline) > 1 else ""
        for span in _attempt_spans(attempt, begin_s):
            if span.end_s > span.start_s:
                yield Span(prefix + span.name, span.start_s, span.end_s, span.split_s, span.note)


def _attempt_spans(attempt: Attempt, begin_s: float) -> Iterator[Span]:
    sent_s = begin_s + attempt.queue_s
    first_s = sent_s + attempt.prefill_s
    held_s = first_s + attempt.transfer_exposed_s
    yield Span("queue", begin_s, sent_s, begin_s)
    yield Span("reserve", sent_s, sent_s + attempt.reserve_s, sent_s, attempt.decode_worker)
    yield Span("prefill", sent_s, first_s, sent_s + attempt.prefill_queue_s, attempt.prefill_worker)
    yield Span("transfer", first_s - attempt.transfer_hidden_s, held_s, first_s)
    yield Span("decode", held_s, held_s + attempt.decode_s, held_s, attempt.decode_worker)


def failures_of(path: RequestPath) -> Iterator[str]:
    for number, attempt in enumerate(path.timeline, start=1):
        if attempt.error_code:
            yield f"attempt {number} failed: {attempt.error_code}: {attempt.error}"
