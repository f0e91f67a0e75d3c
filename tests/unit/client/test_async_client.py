from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from segue import AsyncClient, Completed, FinishReason, Output, RetryPolicy, Started
from segue.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NoWorker,
    Overloaded,
    RequestCancelled,
    RequestError,
    RequestTooLarge,
    SegueError,
    Unreachable,
    WorkerLost,
)
from segue.v1 import inference_pb2 as pb

NOBODY = "127.0.0.1:1"


@pytest.fixture
async def client(router: Any, naps: Any) -> Any:
    async with AsyncClient(router.address, sleep=naps.sleep_async) as made:
        yield made


async def test_generate_gathers_the_whole_answer(router: Any, client: AsyncClient, script: Any) -> None:
    router.scripts = [script.whole_answer]
    answer = await client.generate("Say hello", max_tokens=2, temperature=0, seed=5, stop="!")
    assert (answer.text, answer.token_ids, answer.request_id, answer.model) == ("Hello", (7, 8), "r-1", "tiny")
    assert answer.choices[0].finish_reason is FinishReason.LENGTH
    assert answer.choices[0].logprobs is None
    assert (answer.usage.num_prompt_tokens, answer.usage.num_total_tokens) == (3, 5)
    assert (answer.path.prefill_worker, answer.path.transport, answer.path.ttft_s) == ("prefill-0", "shm", 0.5)
    sampling = pb.SamplingOptions(max_tokens=2, temperature=0, seed=5, stop=["!"])
    assert router.requests == [pb.GenerateRequest(text="Say hello", sampling=sampling)]


async def test_choices_are_kept_apart_and_in_order(router: Any, client: AsyncClient, script: Any) -> None:
    out = script.output
    texts = [out("b", 2, choice=1, logprob=-0.5), out("a", 1, logprob=-0.25), out("c", 3, choice=1, logprob=-1.0)]
    ends = [out("", choice=1, finish=pb.FINISH_REASON_STOP), out("", finish=pb.FINISH_REASON_LENGTH)]
    router.scripts = [[script.started, *texts, *ends, script.completed]]
    answer = await client.generate([1, 2, 3], num_choices=2, num_logprobs=0)
    assert [(choice.index, choice.text, choice.logprobs) for choice in answer.choices] == [
        (0, "a", (-0.25,)),
        (1, "bc", (-0.5, -1.0)),
    ]
    assert [choice.finish_reason for choice in answer.choices] == [FinishReason.LENGTH, FinishReason.STOP]


async def test_stream_yields_typed_events_and_skips_unknown_ones(router: Any, client: AsyncClient, script: Any) -> None:
    router.scripts = [[script.started, pb.GenerateResponse(), *script.whole_answer[1:]]]
    events = [event async for event in client.stream("x")]
    assert [type(event) for event in events] == [Started, Output, Output, Completed]
    assert "".join(event.text for event in events if isinstance(event, Output)) == "Hello"


async def test_leaving_the_loop_early_cancels_the_call(router: Any, client: AsyncClient, script: Any) -> None:
    router.scripts = [[script.started, script.output("a", 1), script.hold]]
    async for event in client.stream("x"):
        if isinstance(event, Output):
            break
    assert await asyncio.wait_for(router.left.get(), 10) == "cancelled"


async def test_leaving_the_with_block_cancels_the_call(router: Any, client: AsyncClient, script: Any) -> None:
    router.scripts = [[script.started, script.hold]]
    async with client.stream("x") as stream:
        events = aiter(stream)
        assert isinstance(await anext(events), Started)
    assert await asyncio.wait_for(router.left.get(), 10) == "cancelled"
    with pytest.raises(RequestCancelled):
        await anext(events)


async def test_cancelling_the_stream_ends_its_reader(router: Any, client: AsyncClient, script: Any) -> None:
    router.scripts = [[script.started, script.hold]]
    stream = client.stream("x")
    began = asyncio.Event()

    async def read() -> None:
        async for _ in stream:
            began.set()

    reader = asyncio.create_task(read())
    await began.wait()
    stream.cancel()
    with pytest.raises(RequestCancelled):
        await reader
    assert await asyncio.wait_for(router.left.get(), 10) == "cancelled"


async def test_cancelling_the_reading_task_cancels_the_call(router: Any, client: AsyncClient, script: Any) -> None:
    router.scripts = [[script.started, script.hold]]
    reader = asyncio.create_task(client.generate("x"))
    await router.arrived.wait()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await asyncio.wait_for(router.left.get(), 10) == "cancelled"


async def test_a_cancelled_stream_sends_nothing_and_a_read_one_is_not_read_again(
    router: Any, client: AsyncClient, script: Any
) -> None:
    cancelled = client.stream("x")
    cancelled.cancel()
    with pytest.raises(RequestCancelled):
        await anext(aiter(cancelled))
    assert router.requests == []
    router.scripts = [script.whole_answer]
    stream = client.stream("x")
    assert [event async for event in stream]
    with pytest.raises(RuntimeError, match="once"):
        aiter(stream)


@pytest.mark.parametrize("error", [WorkerLost("died"), Overloaded("full"), NoWorker("no decode")])
async def test_retryable_errors_are_retried_until_attempts_run_out(
    router: Any, client: AsyncClient, naps: Any, error: SegueError
) -> None:
    router.scripts = [[error], [error], [error], [error]]
    with pytest.raises(type(error), match=error.message):
        await client.generate("x")
    assert (len(router.requests), len(naps.taken_s)) == (3, 2)
    assert 0.05 <= naps.taken_s[0] <= 0.1 <= naps.taken_s[1] <= 0.2


async def test_a_retry_that_succeeds_gives_one_clean_answer(router: Any, client: AsyncClient, script: Any) -> None:
    router.scripts = [[WorkerLost("died")], [script.started, WorkerLost("died")], script.whole_answer]
    assert (await client.generate("x")).text == "Hello"
    assert len(router.requests) == 3


async def test_a_broken_stream_is_gone_on_with(router: Any, client: AsyncClient, naps: Any, script: Any) -> None:
    router.scripts = script.broken_streams()
    async with client.stream("x", num_choices=2) as stream:
        events = [event async for event in stream]
    assert [type(event).__name__ for event in events] == ["Started", *["Output"] * 5, "Completed"]
    texts = ["".join(event.text for event in events if isinstance(event, Output) and event.choice == n) for n in range(2)]
    assert texts == ["ad", "bc!"]
    assert len(naps.taken_s) == 2
    script.check_resumed(router.requests)


async def test_a_broken_stream_has_failed_where_it_shall_not_be_resumed(router: Any, naps: Any, script: Any) -> None:
    router.scripts = script.broken_streams()
    async with AsyncClient(router.address, retry=RetryPolicy(resume=False)) as client:
        with pytest.raises(WorkerLost):
            await client.generate("x")
    assert len(router.requests) == 1


async def test_errors_not_marked_retryable_are_final_and_keep_their_field(router: Any, client: AsyncClient) -> None:
    router.scripts = [[InvalidRequest("temperature", "must be 0 to 100, not 101")]]
    with pytest.raises(RequestError, match="temperature: must be 0 to 100") as caught:
        await client.generate("x", temperature=101)
    assert caught.value.field == "temperature"
    assert len(router.requests) == 1


@pytest.mark.parametrize(
    ("status", "expected", "num_attempts"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unreachable, 3),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded, 1),
        (grpc.StatusCode.CANCELLED, RequestCancelled, 1),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, RequestTooLarge, 1),
        (grpc.StatusCode.UNIMPLEMENTED, InternalError, 1),
        (grpc.StatusCode.DATA_LOSS, InternalError, 1),
    ],
)
async def test_statuses_without_segue_metadata_are_mapped(
    router: Any, client: AsyncClient, script: Any, status: grpc.StatusCode, expected: type[SegueError], num_attempts: int
) -> None:
    router.scripts = [[script.bare_status(status)] for _ in range(4)]
    with pytest.raises(expected):
        await client.generate("x")
    assert len(router.requests) == num_attempts


async def test_nobody_at_the_address(naps: Any) -> None:
    async with AsyncClient(NOBODY, sleep=naps.sleep_async) as client:
        with pytest.raises(Unreachable, match=r"no Segue cluster answers at 127\.0\.0\.1:1"):
            await client.generate("x")
    assert len(naps.taken_s) == 2


async def test_one_attempt_means_no_retry(naps: Any) -> None:
    async with AsyncClient(NOBODY, sleep=naps.sleep_async, retry=RetryPolicy(max_attempts=1)) as client:
        with pytest.raises(Unreachable):
            await client.models()
    assert naps.taken_s == []


async def test_the_deadline_ends_a_call_that_hangs(router: Any, client: AsyncClient, script: Any) -> None:
    router.scripts = [[script.started, script.hold]]
    with pytest.raises(DeadlineExceeded):
        await client.generate("x", timeout_s=0.2)
    assert await asyncio.wait_for(router.left.get(), 10) == "cancelled"
    router.unary = [script.hold]
    with pytest.raises(DeadlineExceeded):
        await client.status(timeout_s=0.2)


async def test_a_stream_that_ends_without_completed_is_an_error(router: Any, client: AsyncClient, script: Any) -> None:
    router.scripts = [[script.started, script.output("a", 1)]]
    with pytest.raises(InternalError, match="before it completed"):
        await client.generate("x")


async def test_tokenize_models_status(router: Any, client: AsyncClient) -> None:
    load = pb.WorkerLoad(free_blocks=5, leased_blocks=2, cached_blocks=3, total_blocks=10, block_size=16)
    worker = pb.WorkerStatus(worker_id="p0", epoch=2, roles=["prefill"], state="ready", pid=9, load=load)
    router.unary = [
        pb.TokenizeResponse(token_ids=[4, 5], max_context=2048),
        pb.ListModelsResponse(models=[pb.Model(id="tiny", max_context=2048, vocab_size=100)]),
        pb.GetClusterStatusResponse(model="tiny", workers=[worker], membership_fresh=True),
    ]
    assert (await client.tokenize([{"role": "user", "content": "hi"}])).token_ids == (4, 5)
    assert [model.id for model in await client.models()] == ["tiny"]
    status = await client.status()
    assert status.workers[0].roles == ("prefill",)
    assert status.workers[0].load.total_blocks == 10
    assert status.missing_roles == ("decode",)
    assert router.requests[0].chat.messages[0].content == "hi"


async def test_wait_ready_waits_for_both_roles(router: Any, client: AsyncClient, naps: Any) -> None:
    def status(*roles: str, state: str = "ready") -> pb.GetClusterStatusResponse:
        return pb.GetClusterStatusResponse(workers=[pb.WorkerStatus(roles=[role], state=state) for role in roles])

    router.unary = [status(), status("prefill"), status("prefill", "decode", state="lost"), status("prefill", "decode")]
    assert len((await client.wait_ready()).workers) == 2
    assert len(naps.taken_s) == 3


async def test_wait_ready_says_what_is_missing_when_time_is_over(router: Any, client: AsyncClient) -> None:
    router.unary = [pb.GetClusterStatusResponse(workers=[pb.WorkerStatus(roles=["prefill"], state="ready")])]
    with pytest.raises(NoWorker, match="no ready worker for: decode"):
        await client.wait_ready(timeout_s=0)


def test_needs_a_running_loop() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncClient()
