"""Sends spans to an OpenTelemetry collector: OTLP over HTTP, in batches, from a thread of its own. Needs segue[otel]."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from segue.config import ObservabilitySettings
from segue.errors import ConfigError
from segue.tracing import NO_SPANS, Span, Spans

_ENV = "OTEL_EXPORTER_OTLP_ENDPOINT"
_TIMEOUT_S = 5


@asynccontextmanager
async def exported_spans(settings: ObservabilitySettings, service: str, instance: str) -> AsyncIterator[Spans]:
    """Spans that go to the collector of the settings or of OTEL_EXPORTER_OTLP_ENDPOINT; nowhere when there is none. What was
    not sent yet is, when the block ends. Raises ConfigError when OpenTelemetry is not installed."""
    if settings.otlp_endpoint is None and not os.environ.get(_ENV):
        yield NO_SPANS
        return
    try:
        exporter = _Exporter(settings.otlp_endpoint, service, instance)
    except ImportError as error:
        raise ConfigError(
            f"otlp_endpoint: traces need OpenTelemetry ({error}): pip install 'segue[otel]', or unset this setting and {_ENV}",
            field="otlp_endpoint",
        ) from None
    try:
        yield Spans(exporter.export)
    finally:
        await asyncio.to_thread(exporter.close)


class _Exporter:
    """`endpoint` None: OpenTelemetry's own environment says where; it has headers, certificates and resource attributes too."""

    def __init__(self, endpoint: str | None, service: str, instance: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        url = f"{endpoint.rstrip('/')}/v1/traces" if endpoint is not None else None
        self._processor = BatchSpanProcessor(OTLPSpanExporter(url, timeout=_TIMEOUT_S))
        self._resource = Resource.create({"service.name": service, "service.instance.id": instance})

    def export(self, span: Span) -> None:
        """Never blocks: when the collector is too slow, spans are dropped."""
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        trace_id, flags = int(span.context.trace_id, 16), TraceFlags(TraceFlags.SAMPLED)
        parent = None
        if span.context.parent_id is not None:
            parent = SpanContext(trace_id, int(span.context.parent_id, 16), is_remote=True, trace_flags=flags)
        self._processor.on_end(
            ReadableSpan(
                name=span.name,
                context=SpanContext(trace_id, int(span.context.span_id, 16), is_remote=False, trace_flags=flags),
                parent=parent,
                resource=self._resource,
                attributes=span.attributes,
                kind=SpanKind[span.kind.upper()],
                instrumentation_scope=InstrumentationScope("segue"),
                status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
                start_time=int(span.start_unix_s * 1e9),
                end_time=int(span.end_unix_s * 1e9),
            )
        )

    def close(self) -> None:
        self._processor.shutdown()  # type: ignore[no-untyped-call]
