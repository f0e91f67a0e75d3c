"""Clients that nobody here wrote, against real processes: the openai package, gRPC from reflection alone, a bare socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import httpx
import openai
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from bench.local_cluster import LocalCluster
from segue import AsyncClient, GenerateOptions
from segue.errors import RequestError
from tests.support.leaks import assert_no_leaks_at
from tests.support.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    model_dir = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    async with LocalCluster(model_dir, kv_memory="2MiB") as cluster:
        yield cluster


@pytest.fixture(autouse=True)
async def no_leaks(cluster: LocalCluster) -> AsyncIterator[None]:
    yield
    await assert_no_leaks_at(cluster.grpc_address)


def options(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 20, "temperature": 0.0} | more


async def test_openai_package_streams(cluster: LocalCluster) -> None:
    async with openai.AsyncOpenAI(base_url=f"http://{cluster.http_address}/v1", api_key="none", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        whole = await client.chat.completions.create(messages=[{"role": "user", "content": "Hi"}], **options())
        stream = await client.chat.completions.create(
            messages=[{"role": "user", "content": "Hi"}], stream=True, stream_options={"include_usage": True}, **options()
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(prompt="a", **options(max_tokens=100_000))
        assert caught.value.param == "max_tokens"


async def test_32_streams_never_mix(cluster: LocalCluster) -> None:
    async with openai.AsyncOpenAI(base_url=f"http://{cluster.http_address}/v1", api_key="none", max_retries=0) as client:

        async def read(index: int) -> str:
            pieces = []
            prompt = f"Stream {index}: " + "ab" * index
            async for chunk in await client.completions.create(prompt=prompt, stream=True, **options()):
                pieces.append(chunk.choices[0].text)
                await asyncio.sleep(0)
            return "".join(pieces)

        alone = [await read(index) for index in range(32)]
        assert len(set(alone)) > 16, "answers differ, so that mixing would show"
        assert await asyncio.gather(*map(read, range(32))) == alone


def call_by_reflection(address: str, prompt: str) -> tuple[str, list[str]]:
    """Generate, without any of Segue's stubs: everything comes from the server's reflection."""
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "segue.v1.InferenceService" in database.get_services()
        pool = DescriptorPool(database)
        method = pool.FindServiceByName("segue.v1.InferenceService").FindMethodByName("Generate")
        request = GetMessageClass(method.input_type)(text=prompt, sampling={"max_tokens": 12, "temperature": 0.0})
        call = channel.unary_stream(
            "/segue.v1.InferenceService/Generate",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        events = list(call(request, timeout=60))
    text = "".join(event.output.text for event in events if event.WhichOneof("event") == "output")
    return text, [event.WhichOneof("event") for event in events]


async def test_grpc_from_reflection_alone(cluster: LocalCluster) -> None:
    text, kinds = await asyncio.to_thread(call_by_reflection, cluster.grpc_address, "Hello")
    async with httpx.AsyncClient() as http:
        body = options(prompt="Hello", max_tokens=12)
        response = await http.post(f"http://{cluster.http_address}/v1/completions", json=body, timeout=60)
    assert text == response.json()["choices"][0]["text"]
    assert kinds[0] == "started"
    assert kinds[-1] == "completed"
    assert set(kinds[1:-1]) == {"output"}


async def test_a_client_that_hangs_up_frees_everything(cluster: LocalCluster) -> None:
    host, _, port = cluster.http_address.partition(":")
    body = json.dumps(options(prompt="x" * 200, max_tokens=250, ignore_eos=True, stream=True)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(10):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(head.encode() + body)
        await reader.readuntil(b"data: ")  # the answer has begun
        writer.transport.abort()
    # The no_leaks fixture now waits until both workers hold nothing.


BAD_REQUESTS: list[tuple[str, bytes, int, str | None]] = [
    ("/v1/completions", b"{", 400, None),
    ("/v1/completions", b'{"prompt": "\xff\xfe"}', 400, None),
    ("/v1/completions", json.dumps(options(prompt="")).encode(), 400, "prompt"),
    ("/v1/completions", json.dumps(options(prompt="x" * 600)).encode(), 400, "prompt"),
    ("/v1/completions", json.dumps(options(prompt=[[1, 2], "a"])).encode(), 400, "prompt"),
    ("/v1/completions", json.dumps(options(prompt=[99999])).encode(), 400, "prompt"),
    ("/v1/completions", json.dumps(options(prompt="a", max_tokens=10**9)).encode(), 400, "max_tokens"),
    ("/v1/completions", json.dumps(options(prompt="a", temperature="hot")).encode(), 400, "temperature"),
    ("/v1/completions", json.dumps(options(prompt="a", top_p=0)).encode(), 400, "top_p"),
    ("/v1/completions", json.dumps(options(prompt="a", n=0)).encode(), 400, "n"),
    ("/v1/completions", json.dumps(options(prompt="a", made_up=1)).encode(), 400, "made_up"),
    ("/v1/completions", json.dumps(options(prompt="a", model="other")).encode(), 404, "model"),
    ("/v1/completions", b'{"prompt": "' + b"x" * (9 * 2**20) + b'"}', 413, None),
    ("/v1/chat/completions", json.dumps(options(messages=[])).encode(), 400, "messages"),
    ("/v1/chat/completions", json.dumps(options(messages=[{"role": "bard", "content": "x"}])).encode(), 400, "messages"),
]


async def test_bad_input_is_refused_by_name_and_the_cluster_serves_on(cluster: LocalCluster) -> None:
    async with httpx.AsyncClient(base_url=f"http://{cluster.http_address}", timeout=30) as http:
        for path, body, status, param in BAD_REQUESTS:
            response = await http.post(path, content=body, headers={"content-type": "application/json"})
            error = response.json()["error"]
            assert response.status_code == status, (body[:80], error)
            assert param is None or str(error["param"]).startswith(param), (body[:80], error)
        good = await http.post("/v1/completions", json=options(prompt="a"))
        assert good.status_code == 200
    requests = (
        (GenerateOptions(max_tokens=0), "max_tokens"),
        (GenerateOptions(top_p=2.0), "top_p"),
        (GenerateOptions(num_choices=99), "num_choices"),
        (GenerateOptions(model="other"), "model"),
    )
    async with AsyncClient(cluster.grpc_address) as client:
        for bad, field in requests:
            with pytest.raises(RequestError) as caught:
                await client.generate("a", **bad)
            assert caught.value.field == field
        assert (await client.generate("a", max_tokens=2)).usage.num_output_tokens >= 1


async def test_health_endpoints_tell(cluster: LocalCluster) -> None:
    async with httpx.AsyncClient(base_url=f"http://{cluster.http_address}", timeout=30) as http:
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).status_code == 200
        metrics = (await http.get("/metrics")).text
    for line in ("segue_", "decode-0", "prefill-0"):
        assert line in metrics
