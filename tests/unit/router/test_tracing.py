"""The router's spans of a request, from its record alone."""

from __future__ import annotations

import pytest

from router.generation import GenerationDone
from router.records import Records, RequestRecord
from router.sequence import FailedAttempt, SequencePath
from router.tracing import RequestTracing, request_spans
from segue.errors import WorkerLost
from segue.lifecycle import Lifecycle, Phase
from segue.tracing import CURRENT_TRACE, Span, Spans, TraceContext

PARENT = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", True)


def path_on(clock: list[float], *phases: tuple[Phase, float]) -> SequencePath:
    """A path whose phases are entered at these seconds."""
    path = SequencePath(Lifecycle(clock=lambda: clock[0]))
    for phase, now_s in phases:
        clock[0] = now_s
        path.lifecycle.enter(phase)
    return path


def traced_record(*paths: SequencePath) -> RequestRecord:
    token = CURRENT_TRACE.set(PARENT.child("request"))
    record = RequestRecord("req_1", "chat", 7, 1000.0)
    CURRENT_TRACE.reset(token)
    record.paths = {f"req_1-{choice}": path for choice, path in enumerate(paths)}
    return record


def test_a_failover_is_two_attempts_one_after_the_other() -> None:
    path = path_on(
        [100.0],
        (Phase.RESERVED, 101.0),
        (Phase.PREFILLING, 101.5),
        (Phase.QUEUED, 103.0),
        (Phase.RESERVED, 104.0),
        (Phase.TRANSFERRING, 106.0),
        (Phase.DECODING, 107.0),
        (Phase.FINISHED, 110.0),
    )
    path.failed_attempts.append(FailedAttempt("prefill-0", "decode-0", WorkerLost("gone")))
    path.prefill_worker, path.decode_worker = "prefill-1", "decode-1"
    record = traced_record(path)
    record.see(GenerationDone(7, 5, (path,)))
    # Now is 112 on the sequences' clock, 1012 in Unix time: 100 is 1000.
    server, *rest = request_spans(record, 1012.0, 112.0)
    assert (server.name, server.kind, server.context.parent_id) == ("chat", "server", PARENT.span_id)
    assert (server.start_unix_s, server.end_unix_s, server.error) == (1000.0, 1012.0, "")
    assert server.attributes["gen_ai.usage.output_tokens"] == 5
    attempts = [span for span in rest if span.name == "attempt"]
    assert [(span.start_unix_s, span.end_unix_s, span.error) for span in attempts] == [
        (1000.0, 1003.0, "gone"),
        (1003.0, 1010.0, ""),
    ]
    assert [span.attributes["segue.decode_worker"] for span in attempts] == ["decode-0", "decode-1"]
    assert {span.context.parent_id for span in attempts} == {server.context.span_id}
    below = [
        [(span.name, span.start_unix_s, span.end_unix_s) for span in rest if span.context.parent_id == one.context.span_id]
        for one in attempts
    ]
    assert below == [
        [("queue", 1000.0, 1001.0), ("reserve", 1001.0, 1001.5), ("prefill", 1001.0, 1003.0)],
        [("queue", 1003.0, 1004.0), ("prefill", 1004.0, 1006.0), ("transfer", 1006.0, 1007.0), ("decode", 1007.0, 1010.0)],
    ]
    assert len({span.context.span_id for span in [server, *rest]}) == 1 + len(rest)


def test_choices_have_attempts_of_their_own() -> None:
    paths = [path_on([start], (Phase.RESERVED, start + 1), (Phase.CANCELLED, start + 2)) for start in (100.0, 105.0)]
    attempts = [span for span in request_spans(traced_record(*paths), 1012.0, 112.0) if span.name == "attempt"]
    assert [(span.attributes["segue.sequence_id"], span.start_unix_s) for span in attempts] == [
        ("req_1-0", 1000.0),
        ("req_1-1", 1005.0),
    ]


def test_a_request_that_is_not_traced_has_no_spans() -> None:
    assert list(request_spans(RequestRecord("req_1", "chat", 7, 1000.0), 1012.0, 112.0)) == []


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_callers_word_on_sampling_holds(ratio: float, sampled: bool) -> None:
    told: list[Span] = []
    tracing = RequestTracing(Spans(told.append), ratio)
    trace = tracing.arrived(f"00-{PARENT.trace_id}-{PARENT.span_id}-0{int(sampled)}")
    assert trace is not None
    assert (trace.trace_id, trace.parent_id, trace.sampled) == (PARENT.trace_id, PARENT.span_id, sampled)
    own = tracing.arrived("no trace context")
    assert own is not None
    assert (own.parent_id, own.sampled) == (None, ratio == 1.0)
    assert own.trace_id != PARENT.trace_id


def test_each_request_is_told_when_it_is_over() -> None:
    told: list[Span] = []
    tracing = RequestTracing(Spans(told.append), 1.0)
    records = Records(on_over=tracing.over)
    token = CURRENT_TRACE.set(tracing.arrived(None))
    try:
        with pytest.raises(WorkerLost), records.record("req_1", "grpc", 3):
            raise WorkerLost("gone")
    finally:
        CURRENT_TRACE.reset(token)
    assert [(span.name, span.error) for span in told] == [("grpc", "gone")]
