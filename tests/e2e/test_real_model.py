"""The real model: token for token what transformers gives in float32, whichever way a request takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bench.local_cluster import LocalCluster
from segue import AsyncClient, GenerateOptions
from tests.support.leaks import assert_no_leaks_at

MAX_TOKENS = 64
GREEDY = GenerateOptions(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
SEEDED = GenerateOptions(max_tokens=16, temperature=0.9, top_p=0.9, seed=11, repetition_penalty=1.1, ignore_eos=True)

Tokens = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def prompts(real_model_dir: Path, prompt_texts: list[str]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(real_model_dir)
    prompts = [tokenizer(text)["input_ids"] for text in prompt_texts]
    assert min(map(len, prompts)) == 5
    assert 1450 <= max(map(len, prompts)) <= 1600
    return prompts


@pytest.fixture(scope="module")
def transformers_model(real_model_dir: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(real_model_dir, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model


def assert_greedy(model: PreTrainedModel, prompt: list[int], tokens: tuple[int, ...]) -> None:
    """Every token is the one that transformers finds likeliest after all before it: by induction, its greedy output.

    One pass over prompt and output, in place of a pass for each token.
    """
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + list(tokens[:-1])])).logits[0, len(prompt) - 1 :]
    assert tuple(logits.argmax(-1).tolist()) == tokens


def generated(model: PreTrainedModel, prompt: list[int]) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False)
    return tuple(output[0, len(prompt) :].tolist())


async def answers(client: AsyncClient, prompts: list[list[int]], options: GenerateOptions, *, at_once: int) -> Tokens:
    gate = asyncio.Semaphore(at_once)

    async def one(prompt: list[int]) -> tuple[int, ...]:
        async with gate:
            return (await client.generate(prompt, **options)).token_ids

    return list(await asyncio.gather(*map(one, prompts)))


@pytest.mark.timeout(400)
async def test_the_same_tokens_as_transformers_every_way(
    real_model_dir: Path, prompts: list[list[int]], transformers_model: PreTrainedModel
) -> None:
    async with running_cluster(real_model_dir, kv_transport="shm") as client:
        greedy = await answers(client, prompts, GREEDY, at_once=16)
        seeded = await answers(client, prompts[3:9], SEEDED, at_once=6)
    for prompt, tokens in zip(prompts, greedy, strict=True):
        assert len(tokens) == MAX_TOKENS
        assert_greedy(transformers_model, prompt, tokens)
    for prompt, tokens in list(zip(prompts, greedy, strict=True))[:2]:
        assert generated(transformers_model, prompt) == tokens

    # Of mixed lengths, half as long: the first half of the same tokens.
    shorter = GenerateOptions(**(GREEDY | {"max_tokens": MAX_TOKENS // 2}))
    expected = [tokens[: MAX_TOKENS // 2] for tokens in greedy]
    ways: list[tuple[dict[str, Any], list[int]]] = [
        ({"colocated": True, "threads": 2}, [*range(0, 15, 2), 17]),
        ({"kv_transport": "tcp"}, [0, 5, 9, 12, 17]),
    ]
    for way, mixed in ways:
        async with running_cluster(real_model_dir, **way) as client:
            cold = await answers(client, [prompts[i] for i in mixed], shorter, at_once=16)
            assert cold == [expected[i] for i in mixed], f"{way}: cold"
            # From the prefix caches, one at a time.
            assert await answers(client, [prompts[17], prompts[12]], shorter, at_once=1) == [expected[17], expected[12]]
            assert await answers(client, prompts[3:9], SEEDED, at_once=6) == seeded, f"{way}: seeded"


@asynccontextmanager
async def running_cluster(model_dir: Path, **options: Any) -> AsyncIterator[AsyncClient]:
    async with LocalCluster(model_dir, kv_memory="1GiB", **options) as cluster, AsyncClient(cluster.grpc_address) as client:
        yield client
        await assert_no_leaks_at(cluster.grpc_address)
