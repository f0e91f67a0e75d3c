"""The front as a whole: its metrics, its ports, its shutdown."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import grpc
import grpc.aio
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.fake import FakeOperator, FakeSequenceServer, Script, token_steps
from router.front import Front
from router.metrics import Metrics
from router.sequence import SequenceRequest, TokenStep
from router.text import Tokenizer
from segue.errors import ConfigError, InvalidRequest, ModelFileError
from segue.logs import JsonFormatter
from segue.v1 import inference_pb2 as pb
from segue.v1.inference_pb2_grpc import InferenceServiceStub

from .conftest import MODEL, ServeFront, model_config, router_settings

Say = Callable[[str], Script]
BODY = {"model": MODEL, "prompt": "the quick"}


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_tell_what_happened(serve: ServeFront, say: Say, tokenizer: Tokenizer) -> None:
    async with serve(say("brown fox")) as running:
        load = pb.WorkerLoad(waiting_requests=1, running_requests=2, queued_tokens=30, free_blocks=4, leased_blocks=5)
        load.cached_blocks, load.total_blocks = 6, 15
        running.core.workers = [pb.WorkerStatus(worker_id="decode-0", roles=["decode"], state="ready", load=load)]
        await running.http.post("/v1/completions", json=BODY)
        await running.http.post("/v1/completions", json=BODY | {"n": 0})
        response = await running.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = samples(response.text)
    num_output = len(tokenizer.encode("brown fox")) + 1
    api = ("api", "completions")
    expected = {
        ("segue_requests_total", (api, ("outcome", "ok"))): 1,
        ("segue_requests_total", (api, ("outcome", "invalid_request"))): 1,
        ("segue_active_requests", (api,)): 0,
        ("segue_time_to_first_token_seconds_count", (api,)): 1,
        ("segue_inter_token_seconds_count", (api,)): num_output - 1,
        ("segue_request_seconds_count", (api,)): 2,
        ("segue_prompt_tokens_total", ()): len(tokenizer.encode("the quick")),
        ("segue_output_tokens_total", ()): num_output,
        ("segue_prefix_hit_tokens_total", (("place", "prefill"),)): 3,
        ("segue_prefix_hit_tokens_total", (("place", "decode"),)): 2,
        ("segue_transferred_bytes_total", ()): 4096,
        ("segue_handover_seconds_count", ()): 1,
        ("segue_worker_state", (("role", "decode"), ("state", "ready"), ("worker", "decode-0"))): 1,
        ("segue_worker_kv_blocks", (("held", "free"), ("worker", "decode-0"))): 4,
        ("segue_worker_kv_blocks", (("held", "leased"), ("worker", "decode-0"))): 5,
        ("segue_worker_kv_blocks", (("held", "cached"), ("worker", "decode-0"))): 6,
        ("segue_worker_kv_blocks_capacity", (("worker", "decode-0"),)): 15,
        ("segue_worker_requests", (("state", "waiting"), ("worker", "decode-0"))): 1,
        ("segue_worker_requests", (("state", "running"), ("worker", "decode-0"))): 2,
        ("segue_worker_queued_tokens", (("worker", "decode-0"),)): 30,
    }
    assert {key: found.get(key) for key in expected} == expected


def test_outcomes_and_times_on_a_clock() -> None:
    now_s = 10.0
    metrics = Metrics(FakeSequenceServer(lambda _: []), clock=lambda: now_s)

    def fail(error: BaseException) -> None:
        nonlocal now_s
        with metrics.track("grpc"):
            now_s += 2.0
            raise error

    for error in (InvalidRequest("n", "no"), asyncio.CancelledError(), KeyError("x")):
        with pytest.raises(type(error)):
            fail(error)
    found = samples(metrics.exposition().decode())
    assert found["segue_request_seconds_sum", (("api", "grpc"),)] == 6.0
    for outcome in ("invalid_request", "cancelled", "internal"):
        assert found["segue_requests_total", (("api", "grpc"), ("outcome", outcome))] == 1


async def test_only_a_second_token_proves_that_decode_works(serve: ServeFront, say: Say) -> None:
    async with serve(say("brown fox")) as running:
        await running.http.post("/v1/completions", json=BODY | {"max_tokens": 1})
        assert running.front.metrics.last_decoded_s is None
        await running.http.post("/v1/completions", json=BODY | {"max_tokens": 2})
        assert running.front.metrics.last_decoded_s is not None
        num_requests = len(running.core.requests)
        assert (await running.http.get("/ready")).status_code == 200
        assert len(running.core.requests) == num_requests


@pytest.mark.parametrize(("setting", "flag"), [("http_port", "--http-port"), ("grpc_port", "--grpc-port")])
async def test_a_port_in_use_is_told_plainly(setting: str, flag: str, tokenizer: Tokenizer, model_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = router_settings(model_dir, **{setting: port})
        with pytest.raises(ConfigError, match=f"port {port} is in use on 127.0.0.1; set {flag}") as caught:
            async with Front(settings, tokenizer, model_config(tokenizer), FakeSequenceServer(lambda _: []), FakeOperator()):
                pass
    assert caught.value.field == setting


async def test_two_fronts_do_not_share_ports(serve: ServeFront, say: Say, tokenizer: Tokenizer, model_dir: Path) -> None:
    async with serve(say("fox")) as running:
        for setting, address in [("http_port", running.front.http_address), ("grpc_port", running.front.grpc_address)]:
            settings = router_settings(model_dir, **{setting: int(address.rpartition(":")[2])})
            with pytest.raises(ConfigError, match="is in use"):
                async with Front(settings, tokenizer, model_config(tokenizer), running.core, FakeOperator()):
                    pass


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Tokenizer, model_dir: Path) -> None:
    config = SimpleNamespace(**vars(model_config(tokenizer)) | {"vocab_size": 10})
    with pytest.raises(ModelFileError, match="vocab_size of 10"):
        Front(router_settings(model_dir), tokenizer, config, FakeSequenceServer(lambda _: []), FakeOperator())


async def test_shutdown_lets_running_requests_finish(tokenizer: Tokenizer, model_dir: Path) -> None:
    gate = asyncio.Event()
    token_ids = tokenizer.encode("brown fox")
    core = FakeSequenceServer(lambda _: [*token_steps(token_ids[:1], None), gate, *token_steps(token_ids[1:])])
    front = Front(router_settings(model_dir, drain_s=30.0), tokenizer, model_config(tokenizer), core, FakeOperator())
    async with httpx.AsyncClient(timeout=20) as http, front:
        url = f"http://{front.http_address}/v1/completions"
        channel = grpc.aio.insecure_channel(front.grpc_address)
        whole = asyncio.create_task(http.post(url, json=BODY))
        call = InferenceServiceStub(channel).Generate(pb.GenerateRequest(text="the"))
        reading = asyncio.create_task(_joined(call))
        await core.until(lambda core: len(core.active) == 2)
        leaving = asyncio.create_task(front.__aexit__(None, None, None))
        await asyncio.sleep(0)
        assert front.readiness.is_draining
        gate.set()
        assert (await whole).json()["choices"][0]["text"] == "brown fox"
        assert await reading == "brown fox"
        await leaving
        with pytest.raises(httpx.ConnectError):
            await http.post(url, json=BODY)
        await channel.close()
    assert len(core.finished) == 2


async def _joined(call: object) -> str:
    return "".join([event.output.text async for event in call])  # type: ignore[attr-defined]


async def test_shutdown_ends_what_does_not_finish(tokenizer: Tokenizer, model_dir: Path) -> None:
    never = asyncio.Event()
    core = FakeSequenceServer(lambda _: [*token_steps([5], None), never])
    async with httpx.AsyncClient(timeout=20) as http, grpc.aio.insecure_channel("127.0.0.1:1"):
        front = Front(router_settings(model_dir, drain_s=0.05), tokenizer, model_config(tokenizer), core, FakeOperator())
        async with front:
            channel = grpc.aio.insecure_channel(front.grpc_address)
            whole = asyncio.create_task(http.post(f"http://{front.http_address}/v1/completions", json=BODY))
            reading = asyncio.create_task(_joined(InferenceServiceStub(channel).Generate(pb.GenerateRequest(text="the"))))
            await core.until(lambda core: len(core.active) == 2)
        results = await asyncio.gather(whole, reading, return_exceptions=True)
        await channel.close()
    assert all(isinstance(result, Exception) for result in results)
    assert (len(core.cancelled), core.active) == (2, set())


async def test_a_client_that_does_not_read_is_cut_off(serve: ServeFront, tokenizer: Tokenizer) -> None:
    """Its sockets' buffers fill up; then the stall limit ends the request, although the client is still there."""
    token_ids = tokenizer.encode("the quick brown fox") * 20
    endless = token_steps(token_ids, None) * 400
    async with serve(lambda _: iter(endless), request_timeout_s=0.2) as running:
        host, port = running.front.http_address.split(":")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, (host, int(port)))
            content = b'{"model": "tiny/chat", "prompt": "the", "stream": true}'
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            await asyncio.get_running_loop().sock_sendall(client, head + content)
            await running.core.until(lambda core: len(core.active) == 1)
            await running.core.until(lambda core: not core.active)
        assert len(running.core.cancelled) == 1


async def test_logs_tell_whose_request_it_was_and_nothing_of_what_it_said(
    serve: ServeFront, caplog: pytest.LogCaptureFixture
) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01", "authorization": "Bearer a-secret-key"}
    caplog.handler.setFormatter(JsonFormatter({"router_id": "router-0"}))

    def broken(_: SequenceRequest) -> list[TokenStep]:
        raise LookupError("a defect")

    async with serve(broken) as running:
        answer = await running.http.post("/v1/completions", json=BODY, headers=headers)
        async with grpc.aio.insecure_channel(running.front.grpc_address) as channel:
            request = pb.GenerateRequest(text="the quick")
            call = InferenceServiceStub(channel).Generate(request, metadata=[("traceparent", headers["traceparent"])])
            with pytest.raises(grpc.aio.AioRpcError):
                _ = [response async for response in call]
    assert answer.status_code == 500
    assert answer.headers["traceresponse"].split("-")[1] == trace_id
    lines = [json.loads(line) for line in caplog.text.splitlines() if line.startswith("{")]
    assert len(lines) == 2
    assert lines[0]["request_id"] == answer.headers["x-request-id"]
    assert {(line["trace_id"], line["router_id"], line["level"]) for line in lines} == {(trace_id, "router-0", "ERROR")}
    assert all("LookupError: a defect" in line["exception"] for line in lines)
    assert "the quick" not in caplog.text
    assert "a-secret-key" not in caplog.text
