"""Every bad request is a 4xx in OpenAI's shape that names the field, and the router serves on."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import pytest

from router.fake import Script
from router.text import Tokenizer

from .conftest import MAX_CONTEXT, MODEL, ServeFront

Say = Callable[[str], Script]

# Each body differs in one field from one that is served.
SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 10**400}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": "2"}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": MAX_CONTEXT}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 5.5}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": 1}, "stop"),
    ({"stop_token_ids": [100_000]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids[0]"),
    ({"stop_token_ids": list(range(80))}, "stop_token_ids"),
    ({"logit_bias": {"100000": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"fox": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias[5]"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"ignore_eos": "yes"}, "ignore_eos"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream_options": {"other": True}}, "stream_options.other"),
    ({"model": 3}, "model"),
    ({"model": None}, "model"),
    ({"unheard_of": 1}, "unheard_of"),
]
COMPLETION: list[tuple[dict[str, Any], str]] = [
    *SAMPLING,
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["the", ""]}, "prompt"),
    ({"prompt": ["the", 3]}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"prompt": {"text": "the"}}, "prompt"),
    ({"prompt": [100_000]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": [5] * MAX_CONTEXT}, "prompt"),
    ({"prompt": "x " * 5000}, "prompt"),
    ({"prompt": ["the"] * 129}, "prompt"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"best_of": 3, "n": 2}, "best_of"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "end"}, "suffix"),
    ({"echo": True}, "echo"),
    ({"messages": []}, "messages"),
]
CHAT: list[tuple[dict[str, Any], str]] = [
    *SAMPLING,
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": ["Hello"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages[0].content"),
    ({"messages": [{"content": "Hello"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "Hello"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "Hello", "name": "Ada"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi", "tool_calls": [{}]}]},
     "messages[1].tool_calls"),
    ({"messages": [{"role": "assistant", "content": "the template refuses this"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x " * 5000}]}, "messages"),
    ({"max_completion_tokens": MAX_CONTEXT}, "max_completion_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 3, "max_tokens": 4}, "max_completion_tokens"),
    ({"logprobs": 2}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy"}}, "audio"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"prompt": "the"}, "prompt"),
]  # fmt: skip
GOOD_COMPLETION = {"model": MODEL, "prompt": "the quick"}
GOOD_CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


@pytest.mark.parametrize(
    ("path", "good", "cases"),
    [("/v1/completions", GOOD_COMPLETION, COMPLETION), ("/v1/chat/completions", GOOD_CHAT, CHAT)],
    ids=["completions", "chat"],
)
async def test_bad_fields_are_named(
    path: str, good: dict[str, Any], cases: list[tuple[dict[str, Any], str]], serve: ServeFront, say: Say
) -> None:
    async with serve(say("fox")) as running:
        for fields, param in cases:
            for stream in (False, True):
                response = await running.http.post(path, json={"stream": stream} | good | fields)
                assert response.status_code == 400, (fields, response.text)
                error = response.json()["error"]
                assert error.keys() == {"message", "type", "param", "code"}
                assert (error["param"], error["type"]) == (param, "invalid_request_error"), (fields, error)
                assert error["message"].startswith(param)
        assert not running.core.requests
        assert (await running.http.post(path, json=good)).status_code == 200


HARMLESS: dict[str, Any] = {
    "user": "ada",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "stream_options": {},
    "stop": None,
    "seed": None,
    "logit_bias": {},
}
NEUTRAL_CHAT: dict[str, Any] = {
    "tools": [],
    "tool_choice": "none",
    "functions": None,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "audio": None,
    "parallel_tool_calls": True,
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "annotations": [], "audio": None},
        {"role": "user", "content": "Hello"},
    ],
}
NEUTRAL_COMPLETION: dict[str, Any] = {"n": 2, "best_of": 2, "suffix": None, "echo": False, "logprobs": None}


async def test_fields_that_change_nothing_are_taken(serve: ServeFront, say: Say) -> None:
    async with serve(say("fox")) as running:
        for path, body in [
            ("/v1/completions", GOOD_COMPLETION | HARMLESS | NEUTRAL_COMPLETION),
            ("/v1/chat/completions", GOOD_CHAT | HARMLESS | NEUTRAL_CHAT),
        ]:
            response = await running.http.post(path, json=body)
            assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"model": "\xff\xfe", "prompt": "x"}', "not valid JSON in UTF-8"),
        (b'{"model": "m", "prompt": "\\ud800"}', "not valid JSON"),
        (b'{"model": "m", "prompt": "x", "temperature": NaN}', "not valid JSON"),
        (b'{"model": "m", "prompt": "x", "temperature": Infinity}', "not valid JSON"),
        (b'{"model": "m", "prompt": "x", "seed": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
    ],
)
async def test_bodies_that_are_not_json(content: bytes, problem: str, serve: ServeFront, say: Say) -> None:
    async with serve(say("fox")) as running:
        for path in ("/v1/completions", "/v1/chat/completions"):
            response = await running.http.post(path, content=content)
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "body"
            assert problem in response.json()["error"]["message"]
        assert (await running.http.post("/v1/completions", json=GOOD_COMPLETION)).status_code == 200


async def test_bodies_that_are_too_large(serve: ServeFront, say: Say) -> None:
    big = json.dumps(GOOD_COMPLETION | {"prompt": "x" * 100_000}).encode()
    async with serve(say("fox"), max_body=65536) as running:
        for content, headers in [(big, {}), (gzip.compress(big), {"Content-Encoding": "gzip"})]:
            response = await running.http.post("/v1/completions", content=content, headers=headers)
            assert response.status_code == 413, response.text
            assert response.json()["error"]["code"] == "request_too_large"
        assert (await running.http.post("/v1/completions", json=GOOD_COMPLETION)).status_code == 200


async def test_a_damaged_compressed_body(serve: ServeFront, say: Say) -> None:
    async with serve(say("fox")) as running:
        response = await running.http.post("/v1/completions", content=b"not gzip", headers={"Content-Encoding": "gzip"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "body"


async def test_limits_of_kv_memory(serve: ServeFront, say: Say, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("the quick brown fox")
    async with serve(say("fox")) as running:
        running.core.max_tokens = len(prompt) + 5
        too_many = await running.http.post("/v1/completions", json=GOOD_COMPLETION | {"prompt": prompt, "max_tokens": 6})
        assert too_many.json()["error"]["param"] == "max_tokens"
        await running.http.post("/v1/completions", json=GOOD_COMPLETION | {"prompt": prompt})
        assert running.core.requests[0].sampling.max_tokens == 5
        running.core.max_tokens = len(prompt)
        too_long = await running.http.post("/v1/completions", json=GOOD_COMPLETION | {"prompt": prompt})
        assert (too_long.status_code, too_long.json()["error"]["param"]) == (400, "prompt")
        assert "KV memory" in too_long.json()["error"]["message"]
