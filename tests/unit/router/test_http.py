"""The OpenAI-compatible API over real sockets, driven by httpx and by the `openai` client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from router.fake import Script, token_steps
from router.sequence import SequenceRequest, TokenStep
from router.text import Tokenizer
from segue.errors import NoWorker, Overloaded, WorkerLost
from segue.sampling import FinishReason, GeneratedToken

from .conftest import MAX_CONTEXT, MODEL, RunningFront, ServeFront

Say = Callable[[str], Script]


async def stream_events(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[Any]:
    """The decoded `data:` payloads; [DONE] as it stands."""
    events = []
    async with http.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                events.append(data if data == "[DONE]" else json.loads(data))
    return events


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "the quick"} | fields


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]} | fields


async def test_completion_with_usage(serve: ServeFront, say: Say, tokenizer: Tokenizer) -> None:
    async with serve(say("brown fox")) as running:
        response = await running.http.post("/v1/completions", json=completion())
    body = response.json()
    num_prompt, num_output = len(tokenizer.encode("the quick")), len(tokenizer.encode("brown fox")) + 1
    assert response.status_code == 200
    assert body["object"] == "text_completion"
    assert body["model"] == MODEL
    assert body["choices"] == [{"index": 0, "text": "brown fox", "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert body["id"].removeprefix("cmpl-") == response.headers["x-request-id"].removeprefix("req_")


async def test_all_forms_of_prompt(serve: ServeFront, say: Say, tokenizer: Tokenizer) -> None:
    async with serve(say("fox")) as running:
        for prompt, expected in [
            ("the", ["the"]),
            (["the", "lazy dog"], ["the", "lazy dog"]),
            (tokenizer.encode("the lazy"), ["the lazy"]),
            ([tokenizer.encode("the"), tokenizer.encode("dog")], ["the", "dog"]),
        ]:
            running.core.requests.clear()
            body = (await running.http.post("/v1/completions", json=completion(prompt=prompt, n=2, temperature=0))).json()
            assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(expected)))
            prompts = sorted(tokenizer.decode(request.prompt_token_ids) for request in running.core.requests)
            assert prompts == sorted(2 * expected)
            assert body["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(text)) for text in expected)


async def test_chat_renders_the_template(serve: ServeFront, say: Say, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "world"}]
    async with serve(say("the answer")) as running:
        body = (
            await running.http.post(
                "/v1/chat/completions",
                json=chat(messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]),
            )
        ).json()
        prompt = b"".join(map(tokenizer.vocabulary.token_bytes, running.core.requests[0].prompt_token_ids)).decode()
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello\nworld<|im_end|>")
    assert body["object"] == "chat.completion"
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "the answer", "refusal": None}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("text", ["the answer is here", "grüße 世界 🦊🦊 ok", "one STOPPED two STOP three"])
async def test_streamed_and_whole_text_agree(text: str, serve: ServeFront, say: Say) -> None:
    options = {"stop": ["STOP "], "temperature": 0}
    async with serve(say(text)) as running:
        whole = (await running.http.post("/v1/completions", json=completion(**options))).json()
        events = await stream_events(running.http, "/v1/completions", completion(**options))
        whole_chat = (await running.http.post("/v1/chat/completions", json=chat(**options))).json()
        chat_events = await stream_events(running.http, "/v1/chat/completions", chat(**options))
    assert events.pop() == chat_events.pop() == "[DONE]"
    assert whole["choices"][0]["text"] == text.partition("STOP ")[0]
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    assert "�" not in whole["choices"][0]["text"]
    deltas = [event["choices"][0]["delta"] for event in chat_events]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == whole_chat["choices"][0]["message"]["content"]
    for finished in (events, chat_events):
        assert [event["choices"][0]["finish_reason"] for event in finished] == [None] * (len(finished) - 1) + ["stop"]


async def test_usage_comes_last_when_asked_for(serve: ServeFront, say: Say) -> None:
    async with serve(say("fox")) as running:
        plain = await stream_events(running.http, "/v1/chat/completions", chat())
        asked = await stream_events(running.http, "/v1/chat/completions", chat(stream_options={"include_usage": True}))
    assert not any("usage" in event for event in plain[:-1])
    *chunks, usage, done = asked
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["total_tokens"] == usage["usage"]["prompt_tokens"] + usage["usage"]["completion_tokens"]


async def test_max_tokens_ends_with_length(serve: ServeFront, say: Say) -> None:
    async with serve(say("the quick brown fox")) as running:
        for name in ("max_tokens", "max_completion_tokens"):
            body = (await running.http.post("/v1/chat/completions", json=chat(**{name: 2}))).json()
            assert body["choices"][0]["finish_reason"] == "length"
            assert body["usage"]["completion_tokens"] == 2


async def test_every_option_reaches_the_sampler(serve: ServeFront, say: Say) -> None:
    fields = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.1,
        "seed": 42,
    }
    async with serve(say("fox")) as running:
        extra = {"logit_bias": {"5": -100, "6": 2.5}, "stop_token_ids": [9], "logprobs": 3}
        response = await running.http.post("/v1/completions", json=completion(**fields, **extra))
        assert response.status_code == 200
        sampling = running.core.requests[0].sampling
        assert {name: getattr(sampling, name) for name in fields} == fields
        assert sampling.logit_bias == {5: -100.0, 6: 2.5}
        assert sampling.stop_token_ids == (1, 9)
        assert sampling.num_logprobs == 3
        await running.http.post("/v1/completions", json=completion(ignore_eos=True))
        assert running.core.requests[1].sampling.stop_token_ids == ()
        assert running.core.requests[1].sampling.num_logprobs is None


def with_logprobs(tokenizer: Tokenizer, text: str) -> Script:
    def script(request: SequenceRequest) -> list[TokenStep]:
        count = request.sampling.num_logprobs or 0
        tokens = [
            GeneratedToken(token_id, -0.5, tuple((rank + 2, -float(rank)) for rank in range(count)))
            for token_id in [*tokenizer.encode(text), 1]
        ]
        return [*(TokenStep((token,)) for token in tokens[:-1]), TokenStep((tokens[-1],), FinishReason.STOP)]

    return script


async def test_completion_logprobs(serve: ServeFront, tokenizer: Tokenizer) -> None:
    text = "the ü fox"
    async with serve(with_logprobs(tokenizer, text)) as running:
        whole = (await running.http.post("/v1/completions", json=completion(logprobs=2))).json()["choices"][0]["logprobs"]
        events = await stream_events(running.http, "/v1/completions", completion(logprobs=2))
        zero = (await running.http.post("/v1/completions", json=completion(logprobs=0))).json()["choices"][0]["logprobs"]
    assert len(whole["tokens"]) == len(tokenizer.encode(text))
    assert "bytes:\\xc3" in whole["tokens"]
    assert whole["text_offset"][0] == 0
    assert whole["text_offset"] == sorted(whole["text_offset"])
    plain = [(token, at) for token, at in zip(whole["tokens"], whole["text_offset"], strict=True) if "\\x" not in token]
    assert all(text[at:].startswith(token) for token, at in plain)
    assert set(whole["token_logprobs"]) == {-0.5}
    assert all(len(top) == 2 for top in whole["top_logprobs"])
    assert all(top == {} for top in zero["top_logprobs"])
    parts = [event["choices"][0]["logprobs"] for event in events[:-1]]
    for name, values in whole.items():
        assert [value for part in parts for value in part[name]] == values


async def test_chat_logprobs(serve: ServeFront, tokenizer: Tokenizer) -> None:
    async with serve(with_logprobs(tokenizer, "a ü")) as running:
        whole = (await running.http.post("/v1/chat/completions", json=chat(logprobs=True, top_logprobs=2))).json()
        events = await stream_events(running.http, "/v1/chat/completions", chat(logprobs=True, top_logprobs=2))
        bare = (await running.http.post("/v1/chat/completions", json=chat(logprobs=True))).json()
    content = whole["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "a ü"
    assert all(entry["logprob"] == -0.5 and len(entry["top_logprobs"]) == 2 for entry in content)
    assert [e for event in events[:-1] for e in event["choices"][0]["logprobs"]["content"]] == content
    assert all(entry["top_logprobs"] == [] for entry in bare["choices"][0]["logprobs"]["content"])


@pytest.fixture
def echo_prompt() -> Script:
    """Answers with the prompt itself, so that mixed-up streams show."""

    def script(request: SequenceRequest) -> list[TokenStep]:
        return token_steps(request.prompt_token_ids)

    return script


async def test_concurrent_streams_never_mix(serve: ServeFront, echo_prompt: Script) -> None:
    async with serve(echo_prompt) as running:
        client = openai.AsyncOpenAI(base_url=running.base_url, api_key="-", max_retries=0)

        async def ask(number: int) -> str:
            stream = await client.completions.create(model=MODEL, prompt=f"request {number} 世 {'x' * number}", stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        answers = await asyncio.gather(*(ask(number) for number in range(32)))
        await client.close()
    assert answers == [f"request {number} 世 {'x' * number}" for number in range(32)]


async def test_openai_client_streams_chat(serve: ServeFront, say: Say) -> None:
    async with serve(say("the answer is 世界")) as running:
        async with openai.AsyncOpenAI(base_url=running.base_url, api_key="-", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Hello"}],
                n=2,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1},
            )
            texts, usage = {0: "", 1: ""}, None
            async for chunk in stream:
                usage = chunk.usage
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
            models = [model.id async for model in client.models.list()]
            model = await client.models.retrieve(MODEL)
        assert running.core.requests[0].sampling.top_k == 5
    assert texts == {0: "the answer is 世界", 1: "the answer is 世界"}
    assert usage is not None
    assert models == [model.id] == [MODEL]


async def test_openai_sync_client(serve: ServeFront, say: Say) -> None:
    async with serve(say("brown fox")) as running:

        def talk() -> tuple[str, str]:
            with openai.OpenAI(base_url=running.base_url, api_key="-", max_retries=0) as client:
                whole = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}])
                with client.completions.create(model=MODEL, prompt="the", stream=True) as stream:
                    return str(whole.choices[0].message.content), "".join(chunk.choices[0].text for chunk in stream)

        assert await asyncio.to_thread(talk) == ("brown fox", "brown fox")


async def test_a_client_that_goes_away_cancels_its_request(serve: ServeFront, tokenizer: Tokenizer) -> None:
    never = asyncio.Event()

    def script(request: SequenceRequest) -> list[TokenStep | asyncio.Event]:
        return [*token_steps(tokenizer.encode("fox"), None), never]

    async with serve(script) as running:
        for stream in (True, False):
            task = asyncio.create_task(_read_until_stuck(running, completion(stream=stream, n=3)))
            await running.core.until(lambda core: len(core.active) == 3)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await running.core.until(lambda core: not core.active)
        assert len(running.core.cancelled) == 6
        metrics = (await running.http.get("/metrics")).text
        assert 'segue_requests_total{api="completions",outcome="cancelled"} 2.0' in metrics
        assert 'segue_active_requests{api="completions"} 0.0' in metrics


async def _read_until_stuck(running: RunningFront, body: dict[str, Any]) -> None:
    async with httpx.AsyncClient(base_url=f"http://{running.front.http_address}", timeout=20) as http:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                pass


async def test_an_error_before_the_first_token_has_its_status(serve: ServeFront) -> None:
    error: list[Any] = [NoWorker("no live worker has the role decode")]
    async with serve(lambda request: error) as running:
        for stream in (False, True):
            response = await running.http.post("/v1/completions", json=completion(stream=stream))
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["code"] == "no_worker"
        error[0] = Overloaded("too many requests")
        response = await running.http.post("/v1/chat/completions", json=chat(stream=True))
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["type"] == "rate_limit_error"


async def test_an_error_in_a_stream_ends_it_without_done(serve: ServeFront, tokenizer: Tokenizer) -> None:
    def script(request: SequenceRequest) -> list[TokenStep | WorkerLost]:
        return [*token_steps(tokenizer.encode("fox"), None), WorkerLost("decode-0 died")]

    async with serve(script) as running:
        events = await stream_events(running.http, "/v1/completions", completion())
        assert events[-1] == {
            "error": {"message": "decode-0 died", "type": "server_error", "param": None, "code": "worker_lost"}
        }
        assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "fox"
        response = await running.http.post("/v1/completions", json=completion())
        assert response.status_code == 503
        assert 'outcome="worker_lost"} 2.0' in (await running.http.get("/metrics")).text


async def test_a_defect_is_a_plain_500(serve: ServeFront, caplog: pytest.LogCaptureFixture) -> None:
    def script(request: SequenceRequest) -> list[TokenStep]:
        raise RuntimeError("secret detail")

    async with serve(script) as running:
        response = await running.http.post("/v1/completions", json=completion())
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert "secret" not in response.text
    assert "secret detail" in caplog.text


async def test_paths_methods_and_models(serve: ServeFront, say: Say) -> None:
    async with serve(say("fox")) as running:
        http = running.http
        for response, status, code in [
            (await http.get("/v1/nothing"), 404, "unknown_path"),
            (await http.get("/v1/completions"), 405, "method_not_allowed"),
            (await http.get("/v1/models/other"), 404, "model_not_found"),
            (await http.post("/v1/completions", json=completion(model="other")), 404, "model_not_found"),
            (await http.post("/v1/chat/completions", json=chat(model="other")), 404, "model_not_found"),
        ]:
            assert response.status_code == status
            assert response.json()["error"]["code"] == code
            assert response.headers["x-request-id"].startswith("req_")
        assert (await http.get("/v1/completions")).headers["allow"] == "POST"
        listed = (await http.get("/v1/models")).json()
        assert listed["data"] == [(await http.get(f"/v1/models/{MODEL}")).json()]
        assert listed["data"][0]["id"] == MODEL
        assert listed["data"][0]["max_context"] == MAX_CONTEXT
        assert (await http.get("/health")).json() == {"status": "ok"}


async def test_ready_sends_a_canary_all_the_way(serve: ServeFront, say: Say) -> None:
    def script(request: SequenceRequest) -> list[TokenStep]:
        assert request.sampling.max_tokens == 2
        return token_steps([3, 4])

    async with serve(script) as running:
        ready = await running.http.get("/ready")
        assert (ready.status_code, ready.json()["ready"]) == (200, True)
        assert len(running.core.finished) == 1
        running.core.missing = ["decode"]
        missing = await running.http.get("/ready")
        assert missing.status_code == 503
        assert missing.headers["retry-after"] == "1"
        assert missing.json() == {"ready": False, "reason": "no live worker for decode", "missing_roles": ["decode"]}


async def stream_with_ids(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], last_event_id: str = ""
) -> tuple[list[tuple[str, Any]], httpx.Response]:
    """(id, payload) of each event; that of [DONE] is empty."""
    events, event_id = [], ""
    headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
    async with http.stream("POST", path, json=body | {"stream": True}, headers=headers) as response:
        if response.status_code != 200:
            await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                event_id = line.removeprefix("id: ")
            elif line.startswith("data: "):
                data = line.removeprefix("data: ")
                events.append((event_id, data if data == "[DONE]" else json.loads(data)))
                event_id = ""
    return events, response


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", completion(n=2, prompt=["the quick", "the quick"], logprobs=1)),
        ("/v1/completions", completion(stop=["is h"], seed=5)),
        ("/v1/chat/completions", chat(n=3, stream_options={"include_usage": True})),
    ],
)
async def test_a_stream_goes_on_after_any_of_its_events(path: str, body: dict[str, Any], serve: ServeFront, say: Say) -> None:
    """On another router, which draws other seeds: all that the script is asked for must be told by the id."""
    async with serve(say("the answer is here 🦊")) as running:
        whole, _ = await stream_with_ids(running.http, path, body)
        seeds = {request.sampling.seed for request in running.core.requests}
    assert whole[-1] == ("", "[DONE]")
    with_ids = [event_id for event_id, _ in whole if event_id]
    assert len(set(with_ids)) == len(with_ids) >= len(whole) - 2, "each chunk has an id of its own, but for usage and [DONE]"

    def payloads(events: list[tuple[str, Any]]) -> list[Any]:
        """But for what is another's: what was cached then."""
        for _, data in events:
            if data != "[DONE]":
                (data.get("usage") or {}).pop("prompt_tokens_details", None)
        return [data for _, data in events]

    async with serve(say("the answer is here 🦊")) as running:
        for place in range(0, len(with_ids), 3):
            rest, _ = await stream_with_ids(running.http, path, body, with_ids[place])
            assert sorted(map(repr, payloads(rest))) == sorted(map(repr, payloads(whole[place + 1 :])))
        assert {request.sampling.seed for request in running.core.requests} == seeds


@pytest.mark.parametrize(
    "event_id",
    [
        "x",
        *("0" * 24 + rest for rest in (":1:1:", f":1:{2**64}:1", f":{2**32}:1:1", ":1:1:1.1", ":1:1:600")),
        "1." * 40_000,
    ],
)
async def test_a_made_up_event_id_is_refused(event_id: str, serve: ServeFront, say: Say) -> None:
    async with serve(say("fox"), max_body=10**6) as running:
        events, response = await stream_with_ids(running.http, "/v1/completions", completion(), event_id[:8000])
        assert (events, response.status_code) == ([], 400)
        assert response.json()["error"]["param"] in {"Last-Event-ID", "resume"}


@pytest.mark.parametrize("num_choices", [1, 2, 3])
async def test_a_stream_may_break_again_while_choices_catch_up(
    num_choices: int, serve: ServeFront, tokenizer: Tokenizer
) -> None:
    """Choice 0 runs ahead in the first stream, and behind when it is computed again."""
    token_ids = tokenizer.encode("the answer is here and there")
    body = completion(n=num_choices, max_tokens=len(token_ids), seed=5)
    is_first = True

    def script(request: SequenceRequest) -> list[TokenStep]:
        steps = token_steps(token_ids)
        size = 4 if is_first and request.sequence_id.endswith("-0") else 1
        parts = [steps[start : start + size] for start in range(0, len(steps), size)]
        return [TokenStep(tuple(t for step in part for t in step.tokens), part[-1].finish_reason) for part in parts]

    def texts(events: list[tuple[str, Any]]) -> list[str]:
        choices = [choice for _, data in events if data != "[DONE]" for choice in data["choices"]]
        return ["".join(c["text"] for c in choices if c["index"] == number) for number in range(num_choices)]

    async with serve(script) as running:
        whole, _ = await stream_with_ids(running.http, "/v1/completions", body)
        is_first = False
        for first in range(0, len(whole) - 2, 2):
            rest, _ = await stream_with_ids(running.http, "/v1/completions", body, whole[first][0])
            for second in range(0, len(rest) - 2, 2):
                again, _ = await stream_with_ids(running.http, "/v1/completions", body, rest[second][0])
                assert texts(whole[: first + 1] + rest[: second + 1] + again) == texts(whole)
