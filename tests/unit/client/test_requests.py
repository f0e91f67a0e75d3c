from __future__ import annotations

from typing import Any

import pytest

from segue.client.events import Output, event_from_pb
from segue.client.requests import GenerateOptions, SamplingOptions, generate_request, tokenize_request
from segue.client.results import GenerationBuilder
from segue.errors import InternalError, InvalidRequest
from segue.v1 import inference_pb2 as pb

EVERY_OPTION: GenerateOptions = {
    "model": "tiny",
    "num_choices": 2,
    "priority": -5,
    "timeout_s": 5.0,
    "max_tokens": 8,
    "min_tokens": 1,
    "temperature": 0.0,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.25,
    "presence_penalty": -1.0,
    "frequency_penalty": 1.0,
    "repetition_penalty": 1.5,
    "logit_bias": {5: -100.0},
    "seed": 2**64 - 1,
    "stop": ["a", "b"],
    "stop_token_ids": [9],
    "ignore_eos": True,
    "num_logprobs": 0,
}


def test_every_option_of_the_wire_can_be_set_and_arrives() -> None:
    assert SamplingOptions.__annotations__.keys() == set(pb.SamplingOptions.DESCRIPTOR.fields_by_name)
    assert EVERY_OPTION.keys() == GenerateOptions.__annotations__.keys()
    request = generate_request("x", EVERY_OPTION)
    assert (request.model, request.num_choices, request.priority, request.text) == ("tiny", 2, -5, "x")
    sent = {field.name for field, _ in request.sampling.ListFields()}
    assert sent == SamplingOptions.__annotations__.keys()
    assert request.sampling.seed == 2**64 - 1
    assert dict(request.sampling.logit_bias) == {5: -100.0}
    assert list(request.sampling.stop) == ["a", "b"]


def test_options_left_out_or_none_stay_unset() -> None:
    request = generate_request("x", {"max_tokens": None, "stop": None, "temperature": None, "num_choices": None})
    assert not request.HasField("sampling")
    assert not request.HasField("num_choices")
    assert generate_request("x", {"temperature": 0}).sampling.HasField("temperature")


def test_the_three_kinds_of_prompt() -> None:
    assert generate_request("", {}).WhichOneof("prompt") == "text"
    assert list(generate_request((1, 2), {}).token_ids.ids) == [1, 2]
    chat = generate_request([{"role": "user", "content": "hi"}], {}).chat
    assert [(message.role, message.content) for message in chat.messages] == [("user", "hi")]
    assert tokenize_request("hi", None).text == "hi"


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("x", {"max_tokens": -1}, "max_tokens"),
        ("x", {"max_tokens": "many"}, "max_tokens"),
        ("x", {"max_tokens": 1.5}, "max_tokens"),
        ("x", {"seed": 2**64}, "seed"),
        ("x", {"temperature": "hot"}, "temperature"),
        ("x", {"stop": [1]}, "stop"),
        ("x", {"stop": 1}, "stop"),
        ("x", {"stop_token_ids": 7}, "stop_token_ids"),
        ("x", {"logit_bias": {"a": 1.0}}, "logit_bias"),
        ("x", {"num_choices": -1}, "num_choices"),
        ("x", {"model": 5}, "model"),
        ("lone surrogate \ud800", {}, "text"),
        ([], {}, "prompt"),
        ([1, -2], {}, "prompt"),
        (["one", "two"], {}, "prompt"),
        (b"bytes", {}, "prompt"),
        (None, {}, "prompt"),
        (5, {}, "prompt"),
        ({"role": "user", "content": "hi"}, {}, "prompt"),
        ([{"role": "user"}], {}, "messages[0]"),
        ([{"role": "user", "content": "hi", "name": "bob"}], {}, "messages[0]"),
        ([{"role": "user", "content": "hi"}, 5], {}, "messages[1]"),
        ([{"role": "user", "content": None}], {}, "messages[0].content"),
        ([{"role": 5, "content": "hi"}], {}, "messages[0].role"),
    ],
)
def test_what_the_wire_cannot_hold_is_refused_by_name(prompt: Any, options: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate_request(prompt, options)
    assert caught.value.field == field


def test_empty_chat_cannot_be_tokenized() -> None:
    with pytest.raises(InvalidRequest, match="messages: is empty"):
        tokenize_request([], None)


def test_a_mistyped_option_is_named() -> None:
    with pytest.raises(TypeError, match=r"unknown option 'max_token'; there are: .*max_tokens"):
        generate_request("x", {"max_token": 5})  # type: ignore[typeddict-unknown-key]


def test_a_finish_reason_from_a_newer_router_is_not_fatal() -> None:
    event = event_from_pb(pb.GenerateResponse(output=pb.Output(text="a", finish_reason=99)))  # type: ignore[arg-type]
    assert event == Output(choice=0, text="a", tokens=(), finish_reason=None)


def test_half_an_answer_is_no_answer() -> None:
    builder = GenerationBuilder()
    builder.add(Output(choice=0, text="a", tokens=(), finish_reason=None))
    with pytest.raises(InternalError, match="lacks"):
        builder.build()
