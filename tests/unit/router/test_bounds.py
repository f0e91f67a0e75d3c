"""What one client can have of a router, and no more."""

from __future__ import annotations

import asyncio
import gzip

import grpc
import grpc.aio
import pytest

from router import http_server
from router.options import MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS
from router.service import MAX_MESSAGES
from segue.v1 import inference_pb2 as pb
from segue.v1.inference_pb2_grpc import InferenceServiceStub

MODEL = "tiny/chat"


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": ""}] * (MAX_MESSAGES + 1)}, "messages"),
        (
            "completions",
            {"prompt": "a", "logit_bias": {str(number): 0 for number in range(MAX_LOGIT_BIASES + 1)}},
            "logit_bias",
        ),
        ("completions", {"prompt": "a", "stop_token_ids": [1] * (MAX_STOP_TOKEN_IDS + 1)}, "stop_token_ids"),
    ],
)
async def test_lists_have_a_longest_length(serve, say, path, fields, named):
    async with serve(say("hi")) as running:
        answer = await running.http.post(f"/v1/{path}", json={"model": MODEL, **fields})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, named)
        assert "at most" in answer.json()["error"]["message"]
        assert not running.core.requests


async def test_a_body_that_comes_drop_by_drop_is_not_waited_for(serve, say, monkeypatch):
    monkeypatch.setattr(http_server, "BODY_LIMIT_S", 0.05)
    async with serve(say("hi")) as running:
        host, _, port = running.front.http_address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_a_small_body_that_unpacks_to_a_large_one_is_refused(serve, say):
    async with serve(say("hi"), max_body=2**16) as running:
        packed = gzip.compress(bytes(2**24))
        assert len(packed) < 2**16
        answer = await running.http.post("/v1/completions", content=packed, headers={"Content-Encoding": "gzip"})
        assert answer.status_code == 413


async def test_long_headers_are_refused(serve, say):
    async with serve(say("hi")) as running:
        assert (await running.http.get("/v1/models", headers={"x-long": "x" * 10_000})).status_code == 400
        many = {f"x-{number}": "x" for number in range(200)}
        assert (await running.http.get("/v1/models", headers=many)).status_code == 400


async def test_connections_are_counted_and_further_ones_turned_away(serve, say):
    async with serve(say("hi"), max_connections=2) as running:
        host, _, port = running.front.http_address.rpartition(":")
        request = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        held = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
        for reader, writer in held:
            writer.write(request)
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        reader, writer = await asyncio.open_connection(host, int(port))
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 503")
        writer.close()
        for _, writer in held:
            writer.close()


async def test_grpc_refuses_large_metadata_and_messages(serve, say):
    async with serve(say("hi"), max_body=2**16) as running, grpc.aio.insecure_channel(running.front.grpc_address) as channel:
        stub = InferenceServiceStub(channel)
        for call in (
            stub.ListModels(pb.ListModelsRequest(), metadata=(("x-long", "x" * 40_000),)),
            stub.Tokenize(pb.TokenizeRequest(text="x" * 2**17)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_grpc_connections_are_counted(serve, say):
    async with serve(say("hi"), max_connections=1) as running:
        address = running.front.grpc_address
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        async with grpc.aio.insecure_channel(address, options=options) as first:
            await InferenceServiceStub(first).ListModels(pb.ListModelsRequest())
            async with grpc.aio.insecure_channel(address, options=options) as second:
                with pytest.raises(grpc.aio.AioRpcError):
                    await InferenceServiceStub(second).ListModels(pb.ListModelsRequest(), timeout=2)
            await InferenceServiceStub(first).ListModels(pb.ListModelsRequest())
