"""A request is one trace, over router and workers, at a collector that takes OTLP over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse

from deploy.valkey import Valkey
from kv_transfer.transports import ShmWriter
from tests.support.cluster import MODEL_NAME, in_process_cluster

TRACE_ID, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
BODY = {"model": MODEL_NAME, "prompt": [5] * 21, "max_tokens": 6, "temperature": 0, "ignore_eos": True}


@dataclass
class Seen:
    """A span, without OTLP's wrapping."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    is_error: bool
    attributes: dict[str, Any]
    under: str = ""


@dataclass
class Collector:
    url: str = ""
    spans: list[Seen] = field(default_factory=list)

    async def take(self, request: web.Request) -> web.Response:
        message = ExportTraceServiceRequest.FromString(await request.read())
        for resource in message.resource_spans:
            (service,) = [one.value.string_value for one in resource.resource.attributes if one.key == "service.name"]
            self.spans += [
                Seen(
                    span.name,
                    service,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    span.status.code == span.status.STATUS_CODE_ERROR,
                    {one.key: one.value.string_value or one.value.int_value for one in span.attributes},
                )
                for scope in resource.scope_spans
                for span in scope.spans
            ]
        body = ExportTraceServiceResponse().SerializeToString()
        return web.Response(body=body, content_type="application/x-protobuf")

    def trace(self, trace_id: str) -> list[Seen]:
        found = [span for span in self.spans if span.trace_id == trace_id]
        names = {span.span_id: span.name for span in found}
        assert len(names) == len(found), "ids of spans are unique"
        for span in found:
            span.under = names.get(span.parent_id, span.parent_id)
        return found


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector, application = Collector(), web.Application()
    application.router.add_post("/v1/traces", collector.take)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    collector.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield collector
    finally:
        await runner.cleanup()


@asynccontextmanager
async def traced_cluster(valkey: Valkey, model: Path, url: str, **router: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Its processes have sent all spans when the block is over."""
    settings = {"otlp_endpoint": url} | router
    async with in_process_cluster(valkey.url, model, router=settings, otlp_endpoint=url, kv_transport="shm") as cluster:
        async with httpx.AsyncClient(base_url=f"http://{cluster.front.http_address}") as client:
            yield client


async def test_a_request_is_one_trace(valkey: Valkey, tiny_model_dir: Path) -> None:
    async with collecting() as collector:
        async with traced_cluster(valkey, tiny_model_dir, collector.url, trace_ratio=0.0) as client:
            traced = await client.post("/v1/completions", json=BODY, headers={"traceparent": f"00-{TRACE_ID}-{CALLER}-01"})
            not_sampled = await client.post("/v1/completions", json=BODY)
            assert (traced.status_code, not_sampled.status_code) == (200, 200)
        spans = collector.trace(TRACE_ID)
        assert len(spans) == len(collector.spans), "the other one, and those of /ready, were not to be sampled"
    # Where the ticket comes after the first token, when it came is not known.
    structure = {(span.service, span.name, span.under) for span in spans if span.name != "reserve"}
    assert structure == {
        ("segue-router", "completions", CALLER),
        ("segue-router", "attempt", "completions"),
        ("segue-router", "queue", "attempt"),
        ("segue-router", "prefill", "attempt"),
        ("segue-router", "transfer", "attempt"),
        ("segue-router", "decode", "attempt"),
        ("segue-worker", "compute prompt", "attempt"),
        ("segue-worker", "send KV", "attempt"),
        ("segue-worker", "receive KV", "attempt"),
        ("segue-worker", "decode steps", "attempt"),
    }
    server = next(span for span in spans if span.name == "completions")
    assert traced.headers["traceresponse"] == f"00-{TRACE_ID}-{server.span_id}-01"
    assert server.attributes["segue.request_id"] == traced.headers["x-request-id"]
    assert (server.attributes["gen_ai.usage.input_tokens"], server.attributes["gen_ai.usage.output_tokens"]) == (21, 6)
    by_name = {span.name: span for span in spans}
    order = [by_name[name] for name in ("queue", "prefill", "transfer", "decode")]
    for before, after in pairwise(order):
        assert before.start_ns <= before.end_ns
        assert abs(after.start_ns - before.end_ns) < 10_000, "one phase ends where the next begins"
    assert not any(span.is_error for span in spans)
    assert not_sampled.headers["traceresponse"].endswith("-00")


async def test_a_failover_is_two_attempts(valkey: Valkey, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, num_damaged = ShmWriter.write, 0

    def damaging(writer: ShmWriter, parcel: Any, regions: list[memoryview]) -> Any:
        nonlocal num_damaged
        payload = honest(writer, parcel, regions)
        if is_armed and not num_damaged:
            num_damaged += 1
            writer.target.memory.region(parcel.layer, parcel.targets[0])[3] ^= 1
        return payload

    is_armed = False
    monkeypatch.setattr(ShmWriter, "write", damaging)
    async with collecting() as collector:
        async with traced_cluster(valkey, tiny_model_dir, collector.url) as client:
            assert (await client.get("/ready")).status_code == 200
            is_armed = True
            answer = await client.post("/v1/completions", json=BODY, headers={"traceparent": f"00-{TRACE_ID}-{CALLER}-01"})
            assert answer.status_code == 200
        spans = collector.trace(TRACE_ID)
        ids = {span.span_id for span in collector.spans}
        orphans = [span for span in collector.spans if span.parent_id not in ids | {"", CALLER}]
        assert orphans == [], "what probes ask for is in no trace"
    attempts = sorted((span for span in spans if span.name == "attempt"), key=lambda span: span.attributes["segue.attempt"])
    assert [(span.attributes["segue.attempt"], span.is_error) for span in attempts] == [(1, True), (2, False)]
    first, second = attempts
    assert first.end_ns <= second.start_ns + 10_000
    computed = {span.parent_id for span in spans if span.name == "compute prompt"}
    # The damage may be seen before the prompt is computed.
    assert second.span_id in computed <= {first.span_id, second.span_id}
    assert [span.parent_id for span in spans if span.name == "decode steps"] == [second.span_id]
    assert [span.is_error for span in spans if span.name == "receive KV" and span.parent_id == first.span_id] == [True]
