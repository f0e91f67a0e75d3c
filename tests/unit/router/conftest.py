"""A tiny model's text side, and a front on real sockets with a scripted core behind it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from router.fake import FakeSequenceServer, Script, token_steps
from router.front import Front
from router.sequence import SequenceRequest, TokenStep
from router.text import Tokenizer
from segue.config import RouterSettings

MODEL = "tiny/chat"
MAX_CONTEXT = 512
CHATML = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' and loop.first %}{{ raise_exception('the assistant may not begin') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Prefill reads the prompt, decode writes the answer.",
    "system user assistant hello world, the answer is here",
]


def write_model(directory: Path) -> None:
    """A byte-level BPE tokenizer with <|im_start|> (0) and <|im_end|> (1), and a ChatML template."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.save(str(directory / "tokenizer.json"))
    config = {"chat_template": CHATML, "eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_model(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(model_dir)


@dataclass
class RunningFront:
    front: Front
    core: FakeSequenceServer
    http: httpx.AsyncClient

    @property
    def base_url(self) -> str:
        return f"http://{self.front.http_address}/v1"


def model_config(tokenizer: Tokenizer, **changes: Any) -> Any:
    """The fields of ModelConfig that the front reads."""
    fields = {
        "max_context": MAX_CONTEXT,
        "vocab_size": tokenizer.num_token_ids,
        "eos_token_ids": (1,),
        "bos_token_id": 0,
    }
    return SimpleNamespace(**(fields | changes))


def router_settings(model_dir: Path, **changes: Any) -> RouterSettings:
    fields = {
        "cluster_id": "test",
        "redis": "unused",
        "model_dir": model_dir,
        "model_name": MODEL,
        "http_port": 0,
        "grpc_port": 0,
    }
    return RouterSettings.model_validate(fields | changes)


ServeFront = Callable[..., Any]


@pytest.fixture
def serve(tokenizer: Tokenizer, model_dir: Path) -> ServeFront:
    """`async with serve(script) as running`: a front whose core plays the script."""

    @asynccontextmanager
    async def running(script: Script, **settings: Any) -> AsyncIterator[RunningFront]:
        core = FakeSequenceServer(script)
        config = model_config(tokenizer)
        async with Front(router_settings(model_dir, drain_s=1.0, **settings), tokenizer, config, core) as front:
            async with httpx.AsyncClient(base_url=f"http://{front.http_address}", timeout=20) as http:
                yield RunningFront(front, core, http)
        assert not core.active, "a request outlived its client"

    return running


@pytest.fixture
def say(tokenizer: Tokenizer) -> Callable[[str], Script]:
    """A script that answers with a text, token by token, and ends at the end-of-sequence token."""

    def make(text: str) -> Script:
        from segue.sampling import FinishReason

        def script(request: SequenceRequest) -> list[TokenStep]:
            token_ids = [*tokenizer.encode(text), 1][: request.sampling.max_tokens]
            return token_steps(token_ids, FinishReason.STOP if token_ids[-1] == 1 else FinishReason.LENGTH)

        return script

    return make
