"""A model whose chat template writes the time into the prompt: a stream that goes on later has the prompt it began with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from router.fake import Script
from router.text import Tokenizer
from segue.v1 import inference_pb2 as pb
from segue.v1.inference_pb2_grpc import InferenceServiceStub

from .conftest import MODEL, ServeFront, write_model

Say = Callable[[str], Script]
DAY_S = 86_400
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Which day is it?"}], "stream": True}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    write_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%d %H:%M:%S') }} {{ messages[0].content }}")
    return tmp_path


@pytest.fixture
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(model_dir)


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    now = time.time

    def come() -> None:
        monkeypatch.setattr(time, "time", lambda: now() + DAY_S)

    return come


def prompts(running: Any) -> list[tuple[int, ...]]:
    return [request.prompt_token_ids for request in running.core.requests]


async def test_server_sent_events(serve: ServeFront, say: Say, tomorrow: Callable[[], None]) -> None:
    async def lines(http: Any, **headers: str) -> list[str]:
        return (await http.post("/v1/chat/completions", json=CHAT, headers=headers)).text.splitlines()

    async with serve(say("a fine day")) as running:
        first = await lines(running.http)
        tomorrow()
        event_id = next(line for line in first if line.startswith("id: ")).removeprefix("id: ")
        await lines(running.http, **{"Last-Event-ID": event_id})
        await lines(running.http)
        begun, resumed, anew = prompts(running)
    assert begun == resumed
    assert begun != anew, "the clock stands still: nothing was shown"
    assert first[0] == "retry: 1000"
    assert sum(line.startswith("retry:") for line in first) == 1


async def test_grpc(serve: ServeFront, say: Say, tokenizer: Tokenizer, tomorrow: Callable[[], None]) -> None:
    request = pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="Which day is it?")]))
    async with serve(say("a fine day")) as running, grpc.aio.insecure_channel(running.front.grpc_address) as channel:
        stub = InferenceServiceStub(channel)
        started, *_ = [event async for event in stub.Generate(request)]
        tomorrow()
        seen = pb.ResumedChoice(token_ids=tokenizer.encode("a"))
        told = started.started
        resume = pb.Resume(seed=told.seed, choices=[seen], created_unix_s=told.created_unix_s)
        again, *_ = [event async for event in stub.Generate(pb.GenerateRequest(chat=request.chat, resume=resume))]
        assert again.started.created_unix_s == told.created_unix_s
        assert [event async for event in stub.Generate(request)]
        begun, resumed, anew = prompts(running)
    assert begun == resumed
    assert begun != anew
