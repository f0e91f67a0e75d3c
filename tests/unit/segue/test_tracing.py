"""W3C trace context, and that nothing of OpenTelemetry is there unless it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.config import ClusterSettings, RouterSettings
from segue.errors import ConfigError, TransferError
from segue.otel import exported_spans
from segue.tracing import Span, Spans, TraceContext

VALID = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("traceparent", "sampled"),
    [(VALID, True), (VALID[:-1] + "0", False), (VALID[:-2] + "ff", True), ("01" + VALID[2:] + "-more", True)],
)
def test_what_is_valid_is_read(traceparent: str, sampled: bool) -> None:
    context = TraceContext.parse(traceparent)
    assert context == TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", sampled)


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "00",
        VALID.upper(),
        "ff" + VALID[2:],
        "0" + VALID,
        VALID + "-more",
        VALID[:-3],
        VALID[:-1],
        VALID + "\n",
        VALID.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
        VALID.replace("00f067aa0ba902b7", "0" * 16),
        VALID.replace("4bf9", "4bg9"),
        VALID.replace("-", "_"),
    ],
)
def test_what_is_not_valid_is_not_gone_on_with(traceparent: str) -> None:
    assert TraceContext.parse(traceparent) is None


@given(st.text(alphabet="0123456789abcdef-", max_size=80))
def test_what_is_read_is_written_alike(text: str) -> None:
    context = TraceContext.parse(text)
    if context is not None and text.startswith("00"):
        assert context.traceparent[:-2] == text[:-2]


def test_a_ratio_of_new_traces_is_sampled() -> None:
    assert all(TraceContext.begin(1.0).sampled for _ in range(50))
    assert not any(TraceContext.begin(0.0).sampled for _ in range(50))
    assert len({TraceContext.begin(0.5).trace_id for _ in range(50)}) == 50


def test_children_differ_by_name_and_parent() -> None:
    parent = TraceContext.begin(1.0)
    child = parent.child("a")
    assert (child.trace_id, child.parent_id, child.sampled) == (parent.trace_id, parent.span_id, True)
    assert child == parent.child("a")
    assert len({parent.span_id, child.span_id, parent.child("b").span_id, child.child("a").span_id}) == 4


def test_only_what_is_sampled_is_told() -> None:
    told: list[Span] = []
    spans = Spans(told.append)
    for traceparent in (VALID, VALID[:-1] + "0", "", "nonsense"):
        spans.add_below(traceparent, "work", 0.0, {})
    (span,) = told
    assert span.context.parent_id == "00f067aa0ba902b7"
    assert span.start_unix_s < span.end_unix_s


def test_an_error_ends_a_span_and_goes_on() -> None:
    told: list[Span] = []
    with pytest.raises(TransferError), Spans(told.append).below(VALID, "receive"):
        raise TransferError("torn")
    assert [(span.name, span.error) for span in told] == [("receive", "torn")]


def test_without_a_collector_opentelemetry_is_not_loaded() -> None:
    """What makes traces, that is: the Redis client loads what makes metrics, where it finds that."""
    ours = ("opentelemetry.exporter", "opentelemetry.sdk.trace")
    script = f"import sys, router.app, deploy.worker; print([name for name in sys.modules if name.startswith({ours})])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


async def test_a_collector_without_the_extra_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    settings = RouterSettings(cluster_id="c", redis="r", model_dir="/m", model_name="m", otlp_endpoint="http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"pip install 'segue\[otel\]'"):
        async with exported_spans(settings, "segue-router", "r"):
            pass


def test_an_endpoint_is_a_url() -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        ClusterSettings.load(flags={"otlp_endpoint": "x:1"}, env={})
