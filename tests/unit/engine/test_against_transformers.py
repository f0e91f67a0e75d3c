"""The engine computes what transformers computes, for every supported architecture."""

from __future__ import annotations

import pytest
import torch

from engine.engine import Engine
from engine.step import Chunk, prepare_step

ARCHITECTURES = [
    "llama",
    "llama3_rope",
    "linear_rope",
    "llama_biases",
    "mistral",
    "mistral_window",
    "qwen2",
    "qwen3",
    "qwen3_biases",
]
NUM_TOKENS = 24


@pytest.mark.parametrize("name", ARCHITECTURES)
async def test_greedy_tokens_are_those_of_transformers(name, checkpoint, prompts):
    model = checkpoint(name)
    with model.engine() as runner:
        for prompt in prompts:
            assert await runner.generate(prompt, NUM_TOKENS) == model.generate(prompt, NUM_TOKENS)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_those_of_transformers(name, checkpoint, prompts):
    model = checkpoint(name)
    with model.engine() as runner:
        engine: Engine = runner.engine
        for prompt in prompts:
            step = prepare_step([Chunk(runner.start(prompt, 1), len(prompt))], engine.layout)
            with torch.inference_mode():
                logits = engine.decoder.forward(step)[0]
            torch.testing.assert_close(logits, model.logits(prompt), rtol=1e-4, atol=1e-4)


def test_a_window_as_transformers_writes_it_limits_the_context(checkpoint):
    assert checkpoint("mistral_window").config.max_context == 64
    assert checkpoint("mistral").config.max_context == 512
