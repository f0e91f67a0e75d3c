"""Anything that a client may send: no answer is a server error, none is missing, and nothing stays behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from segue.sampling import MAX_LOGPROBS
from segue.v1 import inference_pb2 as pb

from .conftest import MODEL

# More of them, and others each time: SEGUE_FUZZ_EXAMPLES=5000 .venv/bin/pytest tests/unit/router/test_fuzz.py
_MORE = int(os.environ.get("SEGUE_FUZZ_EXAMPLES", "0"))
EXAMPLES = settings(
    max_examples=_MORE or 40,
    deadline=None,
    derandomize=not _MORE,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
# Statuses that a client can cause, and no others.
ALLOWED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}


@pytest.fixture(scope="module")
def front(model_dir: Path) -> Iterator[dict[str, str]]:
    """Where a front serves, in a process of its own: `http` and `grpc`."""
    command = [sys.executable, "-m", "tests.support.fake_front", str(model_dir), MODEL]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.stdin.close()
        left = json.loads(process.stdout.readline())
    assert left["active"] == 0, "a request outlived its client"
    assert left["finished"] > 0, "some were served"


@pytest.fixture(scope="module")
def api(front: dict[str, str]) -> Any:
    schema = schemathesis.openapi.from_url(f"http://{front['http']}/openapi.json")
    for request in ("ChatRequest", "CompletionRequest"):
        # Another model is another test; and an answer of any length takes its time.
        fields = schema.raw_schema["components"]["schemas"][request]["properties"]
        fields["model"] = {"const": MODEL}
        fields["max_tokens"] = {"anyOf": [{"type": "integer", "maximum": 20}, {"type": "null"}]}
    return schema


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = [
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/models", "GET"),
    ("/health", "GET"),
    ("/ready", "GET"),
    ("/metrics", "GET"),
    ("/console/state", "GET"),
]


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
@pytest.mark.parametrize("mode", schemathesis.GenerationMode, ids=lambda mode: mode.value)
def test_http(api: Any, path: str, method: str, mode: schemathesis.GenerationMode) -> None:
    """Requests as they are described, and others."""
    if method == "GET" and mode is schemathesis.GenerationMode.NEGATIVE:
        return  # nothing is described that could be otherwise

    @EXAMPLES
    @given(api[path][method].as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=20)

    ask()


@EXAMPLES
@given(st.binary(max_size=200), st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/models/x", "/nothing"]))
def test_http_bodies_that_are_no_json(front: dict[str, str], body: bytes, path: str) -> None:
    assert requests.post(f"http://{front['http']}{path}", data=body, timeout=20).status_code in {400, 404, 405}


numbers = st.one_of(st.sampled_from([0.0, 1.0, -1.0, float("nan"), float("inf"), 1e300]), st.floats())
int32 = st.integers(0, 2**32 - 1)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(0, 30) | int32,
    "min_tokens": st.integers(0, 30),
    "temperature": numbers,
    "top_p": numbers,
    "top_k": int32,
    "min_p": numbers,
    "presence_penalty": numbers,
    "frequency_penalty": numbers,
    "repetition_penalty": numbers,
    "logit_bias": st.dictionaries(int32, numbers, max_size=3),
    "seed": st.integers(0, 2**64 - 1),
    "stop": st.lists(st.text(max_size=5), max_size=3),
    "stop_token_ids": st.lists(int32, max_size=3),
    "ignore_eos": st.booleans(),
    "num_logprobs": st.integers(0, MAX_LOGPROBS + 2),
}


@st.composite
def samplings(draw: st.DrawFn) -> pb.SamplingOptions:
    """A few fields at a time: one that is wrong hides all others."""
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=3, unique=True))
    return pb.SamplingOptions(**{name: draw(FIELDS[name]) for name in names})


messages = st.builds(pb.ChatMessage, role=st.sampled_from(["user", "assistant", "system", ""]), content=st.text(max_size=20))
resumes = st.builds(
    pb.Resume,
    seed=st.integers(0, 2**64 - 1),
    choices=st.lists(
        st.builds(pb.ResumedChoice, token_ids=st.lists(st.integers(0, 400), max_size=4), finished=st.booleans()), max_size=3
    ),
)
prompts = st.one_of(
    st.fixed_dictionaries({"text": st.text(max_size=30)}),
    st.fixed_dictionaries({"token_ids": st.builds(pb.TokenIds, ids=st.lists(st.integers(0, 400), max_size=20))}),
    st.fixed_dictionaries({"chat": st.builds(pb.Chat, messages=st.lists(messages, max_size=3))}),
    st.just({}),
)


@st.composite
def generate_requests(draw: st.DrawFn) -> bytes:
    """Well formed; some with a piece cut out or put in, or with fields that nobody knows."""
    request = pb.GenerateRequest(
        model=draw(st.sampled_from(["", "", MODEL, MODEL, "another"])),
        sampling=draw(samplings()),
        num_choices=draw(st.none() | st.integers(0, 20)),
        resume=draw(st.none() | st.none() | resumes),
        priority=draw(st.just(0) | st.integers(-100, 100) | st.integers(-(2**31), 2**31 - 1)),
        **draw(prompts),
    )
    data = request.SerializeToString()
    if draw(st.integers(0, 3)) == 0:
        cut = draw(st.integers(0, len(data)))
        data = data[:cut] + draw(st.binary(max_size=20)) + data[cut + draw(st.integers(0, 3)) :]
    return data


@EXAMPLES
@given(st.sampled_from(["Generate", "Tokenize", "ListModels", "GetClusterStatus"]), generate_requests())
def test_grpc(front: dict[str, str], method: str, data: bytes) -> None:
    with grpc.insecure_channel(front["grpc"]) as channel:
        name = f"/segue.v1.InferenceService/{method}"
        if method != "Generate":
            call = channel.unary_unary(name).future(data, timeout=20)
            assert call.code() in ALLOWED, call.details()
            return
        call, answers = channel.unary_stream(name)(data, timeout=20), list[bytes]()
        with suppress(grpc.RpcError):
            answers.extend(call)
        assert call.code() in ALLOWED, call.details()
        assert (call.code() is grpc.StatusCode.OK) == (
            bool(answers) and pb.GenerateResponse.FromString(answers[-1]).HasField("completed")
        )
