"""The gRPC API over a real channel, with the generated stubs and with nothing but reflection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from router.fake import Script, token_steps
from router.grpc_api import SERVICE_NAME
from router.sequence import SequenceRequest, TokenStep
from router.text import ChatMessage, Tokenizer
from segue.errors import NoWorker, WorkerLost
from segue.sampling import FinishReason, GeneratedToken
from segue.v1 import inference_pb2 as pb
from segue.v1.inference_pb2_grpc import InferenceServiceStub

from .conftest import MAX_CONTEXT, MODEL, RunningFront, ServeFront

Say = Callable[[str], Script]


@asynccontextmanager
async def connect(running: RunningFront) -> AsyncIterator[tuple[grpc.aio.Channel, InferenceServiceStub]]:
    async with grpc.aio.insecure_channel(running.front.grpc_address) as channel:
        yield channel, InferenceServiceStub(channel)


def trailing(error: grpc.aio.AioRpcError) -> dict[str, str]:
    return {key: str(value) for key, value in error.trailing_metadata() or () if key.startswith("segue-error")}


async def collect(call: Any) -> list[pb.GenerateResponse]:
    return [response async for response in call]


async def test_generate_starts_outputs_and_completes(serve: ServeFront, say: Say, tokenizer: Tokenizer) -> None:
    text, prompt = "the answer 世界", "the quick"
    async with serve(say(text)) as running, connect(running) as (_, stub):
        events = await collect(stub.Generate(pb.GenerateRequest(text=prompt, num_choices=2)))
        assert [request.prompt_token_ids for request in running.core.requests] == [tuple(tokenizer.encode(prompt))] * 2
    started, *outputs, completed = events
    assert started.started.model == MODEL
    assert started.started.request_id.startswith("req_")
    assert started.started.num_prompt_tokens == len(tokenizer.encode(prompt))
    for choice in (0, 1):
        mine = [event.output for event in outputs if event.output.choice == choice]
        assert "".join(output.text for output in mine) == text
        assert [token.id for output in mine for token in output.tokens] == [*tokenizer.encode(text), 1]
        assert [output.finish_reason for output in mine] == [0] * (len(mine) - 1) + [pb.FINISH_REASON_STOP]
    assert completed.completed.num_prompt_tokens == len(tokenizer.encode(prompt))
    assert completed.completed.num_output_tokens == 2 * (len(tokenizer.encode(text)) + 1)
    assert [path.transport for path in completed.completed.paths] == ["shm", "shm"]


async def test_all_forms_of_prompt(serve: ServeFront, say: Say, tokenizer: Tokenizer) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="Hello")])
    async with serve(say("fox")) as running, connect(running) as (_, stub):
        for request in (
            pb.GenerateRequest(model=MODEL, text="the"),
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6])),
            pb.GenerateRequest(chat=chat),
        ):
            await collect(stub.Generate(request))
        expected = [tokenizer.encode("the"), [5, 6], tokenizer.encode_chat([ChatMessage("user", "Hello")], 0)]
        assert [list(request.prompt_token_ids) for request in running.core.requests] == expected
        answer = await stub.Tokenize(pb.TokenizeRequest(chat=chat))
        assert (list(answer.token_ids), answer.max_context) == (expected[2], MAX_CONTEXT)
        assert list((await stub.Tokenize(pb.TokenizeRequest(text="the"))).token_ids) == expected[0]


async def test_every_option_reaches_the_sampler(serve: ServeFront, say: Say) -> None:
    given = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.0,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.25,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "logit_bias": {5: -100.0},
        "seed": 2**64 - 1,
        "num_logprobs": 0,
    }
    async with serve(say("fox")) as running, connect(running) as (_, stub):
        sampling = pb.SamplingOptions(**given, stop_token_ids=[9], ignore_eos=True)
        await collect(stub.Generate(pb.GenerateRequest(text="the", sampling=sampling)))
        await collect(stub.Generate(pb.GenerateRequest(text="the")))
    first, second = (request.sampling for request in running.core.requests)
    assert {name: getattr(first, name) for name in given} == given
    assert first.stop_token_ids == (9,)
    assert (second.temperature, second.stop_token_ids, second.num_logprobs) == (1.0, (1,), None)


async def test_stop_strings_and_logprobs(serve: ServeFront, tokenizer: Tokenizer) -> None:
    def script(request: SequenceRequest) -> list[TokenStep]:
        tokens = [GeneratedToken(token_id, -0.25, ((7, -1.5),)) for token_id in tokenizer.encode("one STOP two")]
        return [*(TokenStep((token,)) for token in tokens), TokenStep((GeneratedToken(1),), FinishReason.STOP)]

    async with serve(script) as running, connect(running) as (_, stub):
        options = pb.SamplingOptions(stop=["STOP"], num_logprobs=1)
        events = await collect(stub.Generate(pb.GenerateRequest(text="the", sampling=options)))
        await running.core.until(lambda core: not core.active)
        assert len(running.core.cancelled) == 1
    outputs = [event.output for event in events[1:-1]]
    assert "".join(output.text for output in outputs) == "one "
    assert outputs[-1].finish_reason == pb.FINISH_REASON_STOP
    assert {token.logprob for output in outputs for token in output.tokens} == {-0.25}
    assert outputs[0].tokens[0].top_logprobs[0] == pb.TopLogprob(id=7, logprob=-1.5)
    assert events[-1].completed.num_output_tokens == sum(len(output.tokens) for output in outputs)


def request(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="the", sampling=pb.SamplingOptions(**fields))


NAN = float("nan")
BAD: list[tuple[pb.GenerateRequest, str]] = [
    (pb.GenerateRequest(), "prompt"),
    (pb.GenerateRequest(text=""), "text"),
    (pb.GenerateRequest(text="x " * 5000), "text"),
    (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[100_000])), "token_ids"),
    (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * MAX_CONTEXT)), "token_ids"),
    (pb.GenerateRequest(chat=pb.Chat()), "messages"),
    (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="tool", content="x")])), "role"),
    (pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="assistant", content="x")])), "messages"),
    (pb.GenerateRequest(text="the", num_choices=0), "num_choices"),
    (pb.GenerateRequest(text="the", num_choices=17), "num_choices"),
    (request(max_tokens=0), "max_tokens"),
    (request(max_tokens=MAX_CONTEXT), "max_tokens"),
    (request(max_tokens=3, min_tokens=4), "min_tokens"),
    (request(temperature=-1), "temperature"),
    (request(temperature=NAN), "temperature"),
    (request(temperature=float("inf")), "temperature"),
    (request(top_p=0), "top_p"),
    (request(top_k=2**31), "top_k"),
    (request(min_p=NAN), "min_p"),
    (request(presence_penalty=2.5), "presence_penalty"),
    (request(frequency_penalty=NAN), "frequency_penalty"),
    (request(repetition_penalty=0), "repetition_penalty"),
    (request(logit_bias={100_000: 1.0}), "logit_bias"),
    (request(logit_bias={5: NAN}), "logit_bias"),
    (request(stop=[""]), "stop"),
    (request(stop=["x"] * 17), "stop"),
    (request(stop_token_ids=[100_000]), "stop_token_ids"),
    (request(num_logprobs=21), "num_logprobs"),
]


async def test_bad_fields_are_named(serve: ServeFront, say: Say) -> None:
    async with serve(say("fox")) as running, connect(running) as (_, stub):
        for bad, field in BAD:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(stub.Generate(bad))
            error = caught.value
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, bad
            assert trailing(error) == {
                "segue-error-code": "invalid_request",
                "segue-error-field": field,
                "segue-error-retryable": "false",
            }, bad
            assert str(error.details()).startswith(field)
        assert not running.core.requests
        await collect(stub.Generate(pb.GenerateRequest(text="the")))
        assert len(running.core.finished) == 1


async def test_other_refusals(serve: ServeFront, say: Say) -> None:
    async with serve(say("fox"), max_body=65536) as running, connect(running) as (channel, stub):
        for call in (
            stub.Generate(pb.GenerateRequest(model="other", text="the")).read,
            lambda: stub.Tokenize(pb.TokenizeRequest(model="other", text="the")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call()
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert trailing(caught.value)["segue-error-field"] == "model"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Tokenize(pb.TokenizeRequest())
        assert trailing(caught.value)["segue-error-field"] == "input"
        # Text that is not UTF-8 cannot be made with the generated classes.
        raw = channel.unary_unary(f"/{SERVICE_NAME}/Tokenize")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw(b"\x12\x02\xff\xfe")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert trailing(caught.value)["segue-error-field"] == "request"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Tokenize(pb.TokenizeRequest(text="x" * 100_000))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Tokenize(pb.TokenizeRequest(text="the"))).token_ids


@pytest.mark.parametrize("error", [NoWorker("no live worker has the role decode"), WorkerLost("decode-0 died")])
async def test_retryable_errors_say_so(error: NoWorker | WorkerLost, serve: ServeFront, tokenizer: Tokenizer) -> None:
    async with serve(lambda _: [*token_steps([5], None), error]) as running, connect(running) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub.Generate(pb.GenerateRequest(text="the")))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert trailing(caught.value) == {"segue-error-code": error.code, "segue-error-retryable": "true"}
    assert caught.value.details() == error.message


async def test_a_defect_says_nothing_of_the_inside(serve: ServeFront, caplog: pytest.LogCaptureFixture) -> None:
    def script(_: SequenceRequest) -> list[TokenStep]:
        raise RuntimeError("secret detail")

    async with serve(script) as running, connect(running) as (_, stub):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(stub.Generate(pb.GenerateRequest(text="the")))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in str(caught.value.details())
    assert "secret detail" in caplog.text


async def test_ending_the_call_cancels_the_request(serve: ServeFront, tokenizer: Tokenizer) -> None:
    never = asyncio.Event()
    async with serve(lambda _: [*token_steps([5], None), never]) as running, connect(running) as (_, stub):
        call = stub.Generate(pb.GenerateRequest(text="the", num_choices=2))
        await call.read()
        await running.core.until(lambda core: len(core.active) == 2)
        call.cancel()
        await running.core.until(lambda core: not core.active)
        deadline = stub.Generate(pb.GenerateRequest(text="the"), timeout=0.2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(deadline)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await running.core.until(lambda core: not core.active)
        assert len(running.core.cancelled) == 3


async def test_concurrent_streams_never_mix(serve: ServeFront, tokenizer: Tokenizer) -> None:
    async with serve(lambda request: token_steps(request.prompt_token_ids)) as running, connect(running) as (_, stub):

        async def ask(number: int) -> str:
            events = await collect(stub.Generate(pb.GenerateRequest(text=f"request {number} 世 {'x' * number}")))
            return "".join(event.output.text for event in events)

        answers = await asyncio.gather(*(ask(number) for number in range(32)))
    assert answers == [f"request {number} 世 {'x' * number}" for number in range(32)]


async def test_models_and_status(serve: ServeFront, say: Say, tokenizer: Tokenizer) -> None:
    async with serve(say("fox")) as running, connect(running) as (_, stub):
        running.core.workers = [pb.WorkerStatus(worker_id="decode-0", roles=["decode"], state="ready")]
        [model] = (await stub.ListModels(pb.ListModelsRequest())).models
        assert (model.id, model.max_context, model.vocab_size) == (MODEL, MAX_CONTEXT, tokenizer.num_token_ids)
        status = await stub.GetClusterStatus(pb.GetClusterStatusRequest())
        assert [worker.worker_id for worker in status.workers] == ["decode-0"]


async def test_health_tells_what_ready_tells(serve: ServeFront) -> None:
    statuses = health_pb2.HealthCheckResponse
    async with serve(lambda _: token_steps([3, 4])) as running, connect(running) as (channel, _):
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE_NAME):
            assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == statuses.SERVING
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == statuses.SERVING
        running.core.missing = ["prefill"]
        assert (await watch.read()).status == statuses.NOT_SERVING
        watch.cancel()
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == statuses.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def reflected_files(channel: grpc.aio.Channel, symbol: str) -> list[descriptor_pb2.FileDescriptorProto]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)]))
    answer = await call.read()
    return [
        descriptor_pb2.FileDescriptorProto.FromString(data) for data in answer.file_descriptor_response.file_descriptor_proto
    ]


async def test_a_client_built_from_reflection(serve: ServeFront, say: Say) -> None:
    """No generated code of ours: every rpc that the description has is called by its description."""
    async with serve(say("brown fox")) as running, connect(running) as (channel, _):
        pool = descriptor_pool.DescriptorPool()
        for file in await reflected_files(channel, SERVICE_NAME):
            pool.Add(file)
        service = pool.FindServiceByName(SERVICE_NAME)
        fields = {"Generate": {"text": "the"}, "Tokenize": {"text": "the"}}
        answers = {}
        for method in service.methods:
            message = message_factory.GetMessageClass(method.input_type)(**fields.get(method.name, {}))
            answer_class = message_factory.GetMessageClass(method.output_type)
            kind = channel.unary_stream if method.server_streaming else channel.unary_unary
            call = kind(f"/{SERVICE_NAME}/{method.name}", lambda m: m.SerializeToString(), answer_class.FromString)(message)
            answers[method.name] = await collect(call) if method.server_streaming else await call
    assert answers.keys() == {"Generate", "Tokenize", "ListModels", "GetClusterStatus"}
    assert "".join(event.output.text for event in answers["Generate"]) == "brown fox"
    assert answers["ListModels"].models[0].id == MODEL
