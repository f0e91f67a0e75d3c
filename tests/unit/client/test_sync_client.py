"""The blocking client runs in threads here, against a router served by this test's event loop."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from segue import Client, Completed, Output, Started
from segue.errors import DeadlineExceeded, NoWorker, RequestCancelled, RequestError, Unreachable, WorkerLost
from segue.v1 import inference_pb2 as pb


@pytest.fixture
def client(router: Any, naps: Any) -> Iterator[Client]:
    with Client(router.address, sleep=naps.sleep) as made:
        yield made


async def test_generate_and_stream(router: Any, client: Client, script: Any) -> None:
    router.scripts = [script.whole_answer, script.whole_answer]
    answer = await asyncio.to_thread(client.generate, "Say hello", max_tokens=2)
    assert (answer.text, answer.token_ids) == ("Hello", (7, 8))
    events = await asyncio.to_thread(lambda: list(client.stream([1, 2])))
    assert [type(event) for event in events] == [Started, Output, Output, Completed]
    assert list(router.requests[1].token_ids.ids) == [1, 2]


async def test_several_threads_share_a_client(router: Any, client: Client, script: Any) -> None:
    router.scripts = [script.whole_answer for _ in range(8)]
    answers = await asyncio.gather(*(asyncio.to_thread(client.generate, f"prompt {i}") for i in range(8)))
    assert [answer.text for answer in answers] == ["Hello"] * 8
    assert {request.text for request in router.requests} == {f"prompt {i}" for i in range(8)}


async def test_leaving_the_loop_early_cancels_the_call(router: Any, client: Client, script: Any) -> None:
    router.scripts = [[script.started, script.output("a", 1), script.hold]]

    def read_a_little() -> None:
        for event in client.stream("x"):
            if isinstance(event, Output):
                break

    await asyncio.to_thread(read_a_little)
    assert await asyncio.wait_for(router.left.get(), 10) == "cancelled"


async def test_leaving_the_with_block_cancels_the_call(router: Any, client: Client, script: Any) -> None:
    router.scripts = [[script.started, script.hold]]

    def read_a_little() -> Iterator[Any]:
        with client.stream("x") as stream:
            events = iter(stream)
            assert isinstance(next(events), Started)
        return events

    events = await asyncio.to_thread(read_a_little)
    assert await asyncio.wait_for(router.left.get(), 10) == "cancelled"
    with pytest.raises(RequestCancelled):
        await asyncio.to_thread(list, events)


async def test_another_thread_may_cancel(router: Any, client: Client, script: Any) -> None:
    router.scripts = [[script.started, script.hold]]
    stream = client.stream("x")
    began = threading.Event()

    def read() -> None:
        for _ in stream:
            began.set()

    reader = asyncio.create_task(asyncio.to_thread(read))
    await asyncio.to_thread(began.wait)
    stream.cancel()
    with pytest.raises(RequestCancelled):
        await reader
    assert await asyncio.wait_for(router.left.get(), 10) == "cancelled"


async def test_a_stream_is_read_once(router: Any, client: Client, script: Any) -> None:
    router.scripts = [script.whole_answer]
    stream = client.stream("x")
    await asyncio.to_thread(list, stream)
    with pytest.raises(RuntimeError, match="once"):
        next(iter(stream))


async def test_retries_before_output_and_after(router: Any, client: Client, naps: Any, script: Any) -> None:
    router.scripts = [[script.started, WorkerLost("died")], script.whole_answer]
    assert (await asyncio.to_thread(client.generate, "x")).text == "Hello"
    assert (len(router.requests), len(naps.taken_s)) == (2, 1)
    router.requests.clear()
    router.scripts = script.broken_streams()
    answer = await asyncio.to_thread(client.generate, "x", num_choices=2)
    assert [choice.text for choice in answer.choices] == ["ad", "bc!"]
    script.check_resumed(router.requests)


async def test_errors_keep_their_field(router: Any, client: Client) -> None:
    router.unary = [RequestError("text: is empty", field="text")]
    with pytest.raises(RequestError, match="text: is empty") as caught:
        await asyncio.to_thread(client.tokenize, "")
    assert caught.value.field == "text"


async def test_deadlines(router: Any, client: Client, script: Any) -> None:
    router.scripts, router.unary = [[script.started, script.hold]], [script.hold]
    with pytest.raises(DeadlineExceeded):
        await asyncio.to_thread(client.generate, "x", timeout_s=0.2)
    with pytest.raises(DeadlineExceeded):
        await asyncio.to_thread(client.models, timeout_s=0.2)


async def test_models_and_readiness(router: Any, client: Client, naps: Any) -> None:
    both = pb.GetClusterStatusResponse(workers=[pb.WorkerStatus(roles=["prefill", "decode"], state="ready")])
    router.unary = [pb.ListModelsResponse(models=[pb.Model(id="tiny")]), pb.GetClusterStatusResponse(), both]
    assert [model.id for model in await asyncio.to_thread(client.models)] == ["tiny"]
    assert (await asyncio.to_thread(client.wait_ready)).workers[0].state == "ready"
    assert len(naps.taken_s) == 1
    router.unary = [pb.GetClusterStatusResponse()]
    with pytest.raises(NoWorker, match="prefill, decode"):
        await asyncio.to_thread(client.wait_ready, timeout_s=0)


def test_nobody_at_the_address(naps: Any) -> None:
    with Client("127.0.0.1:1", sleep=naps.sleep) as client:
        with pytest.raises(Unreachable, match=r"no Segue cluster answers at 127\.0\.0\.1:1"):
            client.status()
        with pytest.raises(Unreachable):
            client.wait_ready(timeout_s=0)


def test_importing_segue_loads_no_more_than_grpc_and_protobuf() -> None:
    listing = "import sys, segue; print(*sorted({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    loaded = subprocess.run([sys.executable, "-I", "-c", listing], check=True, capture_output=True, text=True).stdout.split()
    # gRPC itself loads its sibling packages (grpc_health, ...) where they are installed.
    allowed = {"segue", "google", "typing_extensions", "cython_runtime", "sitecustomize"}
    assert {name for name in loaded if not name.startswith(("_", "grpc"))} <= allowed
