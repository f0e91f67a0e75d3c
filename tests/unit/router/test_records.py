"""What is remembered of requests, and in which forms it travels."""

from __future__ import annotations

import asyncio
import json

import grpc.aio
import httpx
import pytest

from router.explain import path_text, timing_text
from router.fake import token_steps
from router.generation import GenerationDone
from router.records import MAX_PATHS, Records
from router.sequence import SequencePath
from segue.client import AsyncClient
from segue.errors import RequestError, WorkerLost
from segue.lifecycle import Phase
from segue.v1 import inference_pb2 as pb
from segue.v1.inference_pb2_grpc import InferenceServiceStub

from .conftest import MODEL, ServeFront


def test_running_and_ended_requests_are_found_in_every_form_of_their_id() -> None:
    records = Records(clock=lambda: 7.0)
    with records.record("req_1", "chat", 3) as record:
        record.paths["req_1-0"] = path = SequencePath(prefill_worker="prefill-0")
        found = records.find("req_1")
        assert found is not None
        assert (found.outcome, found.paths[0].prefill_worker, found.arrived_unix_s) == ("running", "prefill-0", 7.0)
        record.see(GenerationDone(3, 5, (path,)))
    for form in ("req_1", "chatcmpl-1", "cmpl-1"):
        found = records.find(form)
        assert found is not None
        assert (found.outcome, found.num_prompt_tokens, found.num_output_tokens) == ("ok", 3, 5)
    assert records.find("req_2") is None


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(WorkerLost("gone"), "worker_lost"), (asyncio.CancelledError(), "cancelled"), (ZeroDivisionError(), "internal")],
)
def test_however_a_request_ends(error: BaseException, outcome: str) -> None:
    records = Records()
    with pytest.raises(type(error)), records.record("req_1", "grpc", 1):
        raise error
    assert records.latest(1)[0].outcome == outcome


def test_an_error_that_went_into_a_stream_is_remembered() -> None:
    records = Records()
    with records.record("req_1", "chat", 1) as record:
        record.paths["req_1-0"] = SequencePath(error=WorkerLost("gone"))
    (remembered,) = records.latest(5)
    assert (remembered.outcome, remembered.error) == ("worker_lost", "gone")


def test_memory_is_bounded() -> None:
    records = Records(max_records=3)
    for number in range(5):
        with records.record(f"req_{number}", "completions", 1) as record:
            record.paths |= {f"{choice}": SequencePath() for choice in range(2 * MAX_PATHS)}
    assert [record.request_id for record in records.latest(9)] == ["req_4", "req_3", "req_2"]
    assert len(records.latest(1)[0].paths) == MAX_PATHS
    assert records.find("req_1") is None


def test_header_forms() -> None:
    now = [0.0]
    path = SequencePath(prefill_worker='a"\\\r\nb', placement="disaggregated", prefill_cached_tokens=4)
    path.lifecycle.clock = lambda: now[0]
    path.lifecycle.history[0] = (Phase.QUEUED, 0.0)
    now[0] = 0.0105
    path.lifecycle.enter(Phase.RESERVED)
    assert path_text(path) == (
        'prefill="ab", placement="disaggregated", transport="none", attempts=1, '
        "prefill-cached=4, prefill-pulled=0, decode-cached=0, transferred=0"
    )
    assert timing_text(path).startswith("queue;dur=10.5, reserve;dur=0.0, prefill;dur=0.0, transfer-hidden;dur=0.0")


BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "n": 2}


async def test_http_answers_tell_their_path(serve: ServeFront) -> None:
    async with serve(lambda _: token_steps([5, 6, 7])) as running:
        plain = await running.http.post("/v1/chat/completions", json=BODY)
        assert plain.headers["x-segue-path"].startswith('prefill="prefill-0", decode="decode-0", transport="shm", attempts=1')
        assert "prefill;dur=" in plain.headers["server-timing"]
        assert "paths" not in plain.json()
        whole = (await running.http.post("/v1/chat/completions", json=BODY | {"include_path": True})).json()
        assert [path["decode_worker"] for path in whole["paths"]] == ["decode-0", "decode-0"]
        assert whole["paths"][0]["timeline"][0]["prefill_worker"] == "prefill-0"
        streamed = await running.http.post("/v1/chat/completions", json=BODY | {"stream": True, "include_path": True})
        chunks = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
        assert [len(chunk.get("paths", ())) for chunk in chunks] == [0] * (len(chunks) - 1) + [2]
        assert "usage" not in chunks[-1]
        async with AsyncClient(running.front.grpc_address) as client:
            record = await client.explain(whole["id"])
            assert (record.api, record.outcome, len(record.paths), record.num_output_tokens) == ("chat", "ok", 2, 6)
            assert (await client.explain()).request_id == streamed.headers["x-request-id"]
            with pytest.raises(RequestError, match="is not among the latest requests of this router"):
                await client.explain("req_unknown")


async def test_a_failed_answer_tells_its_path_too(serve: ServeFront) -> None:
    async with serve(lambda _: [WorkerLost("gone")]) as running:
        failed: httpx.Response = await running.http.post("/v1/chat/completions", json=BODY)
        assert failed.status_code == 503
        assert 'decode="decode-0"' in failed.headers["x-segue-path"]
        async with grpc.aio.insecure_channel(running.front.grpc_address) as channel:
            call = InferenceServiceStub(channel).Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5])))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                [response async for response in call]
            trailing = dict(caught.value.trailing_metadata() or ())
            assert 'prefill="prefill-0"' in str(trailing["segue-path"])
            assert trailing["segue-error-code"] == "worker_lost"


async def test_a_good_grpc_answer_tells_its_path_in_trailing_metadata(serve: ServeFront) -> None:
    async with (
        serve(lambda _: token_steps([5, 6])) as running,
        grpc.aio.insecure_channel(running.front.grpc_address) as channel,
    ):
        call = InferenceServiceStub(channel).Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5])))
        *_, completed = [response async for response in call]
        assert completed.completed.paths[0].timeline[0].decode_worker == "decode-0"
        assert 'decode="decode-0"' in str(dict(await call.trailing_metadata() or ())["segue-path"])
