"""The real model: token for token what transformers gives in float32, whichever way a request takes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bench.local_cluster import LocalCluster
from segue import AsyncClient, GenerateOptions
from tests.support.leaks import assert_no_leaks_at

MAX_TOKENS = 64
GREEDY = GenerateOptions(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
SEEDED = GenerateOptions(max_tokens=24, temperature=0.9, top_p=0.9, seed=11, repetition_penalty=1.1, ignore_eos=True)

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
    greedy: dict[str, Tokens] = {}
    seeded: dict[str, Tokens] = {}
    for name, colocated, kv_transport in (("colocated", True, "auto"), ("shm", False, "shm"), ("tcp", False, "tcp")):
        async with (
            LocalCluster(real_model_dir, colocated=colocated, kv_transport=kv_transport, kv_memory="1GiB") as cluster,
            AsyncClient(cluster.grpc_address) as client,
        ):
            greedy[name] = await answers(client, prompts, GREEDY, at_once=16)
            # The prompts are in the prefix caches now.
            assert await answers(client, prompts[-3:], GREEDY, at_once=1) == greedy[name][-3:], f"{name}: from caches, alone"
            seeded[name] = await answers(client, prompts[3:12], SEEDED, at_once=9)
            assert await answers(client, prompts[3:5], SEEDED, at_once=1) == seeded[name][:2], f"{name}: seeded, alone"
            await assert_no_leaks_at(cluster.grpc_address)
    assert greedy["colocated"] == greedy["shm"] == greedy["tcp"]
    assert seeded["colocated"] == seeded["shm"] == seeded["tcp"]
    for prompt, tokens in zip(prompts, greedy["shm"], strict=True):
        assert len(tokens) == MAX_TOKENS
        assert_greedy(transformers_model, prompt, tokens)
    for prompt, tokens in list(zip(prompts, greedy["shm"], strict=True))[:4]:
        assert generated(transformers_model, prompt) == tokens
