"""Disaggregated = colocated = the model itself, token for token: greedy and seeded, every transport, cold and from caches,
alone and in a crowd."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from deploy.valkey import Valkey
from engine.calibration import ensure_calibrated
from router.sequence import SequencePath, SequenceRequest
from segue import AsyncClient, GenerateOptions
from segue.sampling import FinishReason, SamplingParams
from tests.support.cluster import in_process_cluster

MAX_TOKENS = 24
GREEDY = GenerateOptions(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
SEEDED = GenerateOptions(
    max_tokens=MAX_TOKENS,
    temperature=1.3,
    top_p=0.95,
    top_k=50,
    seed=7,
    repetition_penalty=1.2,
    frequency_penalty=0.3,
    min_tokens=4,
    logit_bias={40: 2.0},
    ignore_eos=True,
)


def make_prompts() -> list[list[int]]:
    """Mixed lengths, on and off block and chunk borders; some share beginnings."""
    chance = random.Random(1)
    prompts = [[chance.randrange(3, 259) for _ in range(n)] for n in (1, 2, 3, 4, 5, 8, 31, 32, 33, 64, 90, 150)]
    return [*prompts, prompts[9] + [5, 6, 7], [*prompts[9][:40], 9], prompts[11][:64], [17] * 40]


async def answers(client: AsyncClient, options: GenerateOptions, *, together: bool) -> list[tuple[int, ...]]:
    if together:
        results = await asyncio.gather(*(client.generate(prompt, **options) for prompt in make_prompts()))
    else:
        results = [await client.generate(prompt, **options) for prompt in make_prompts()]
    return [result.token_ids for result in results]


@pytest.fixture(scope="session")
def reference_tokens(tiny_model_dir: Path) -> list[tuple[int, ...]]:
    """What transformers generates greedily."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    results = []
    for prompt in make_prompts():
        output = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=MAX_TOKENS, do_sample=False
        )
        results.append(tuple(output[0, len(prompt) :].tolist()))
    return results


@pytest.fixture(scope="session")
async def seeded_tokens(valkey: Valkey, tiny_model_dir: Path) -> list[tuple[int, ...]]:
    """What a colocated worker samples, one request at a time, its caches cold for each."""
    async with in_process_cluster(valkey.url, tiny_model_dir, colocated=True) as cluster:
        return await answers(cluster.client, SEEDED, together=False)


@pytest.mark.parametrize(
    ("colocated", "kv_transport", "used"),
    [(True, "auto", "local"), (False, "auto", "shm"), (False, "tcp", "tcp"), (False, "dist", "dist")],
)
async def test_the_same_tokens_every_way(
    valkey: Valkey,
    tiny_model_dir: Path,
    reference_tokens: list[tuple[int, ...]],
    seeded_tokens: list[tuple[int, ...]],
    colocated: bool,
    kv_transport: str,
    used: str,
) -> None:
    async with in_process_cluster(valkey.url, tiny_model_dir, colocated=colocated, kv_transport=kv_transport) as cluster:
        assert await answers(cluster.client, GREEDY, together=True) == reference_tokens, "cold, in a crowd"
        assert await answers(cluster.client, GREEDY, together=False) == reference_tokens, "from caches, alone"
        assert await answers(cluster.client, SEEDED, together=True) == seeded_tokens, "seeded, in a crowd"
        assert await answers(cluster.client, SEEDED, together=False) == seeded_tokens, "seeded, alone"
        again = await cluster.client.generate(make_prompts()[11], **GREEDY)
        assert again.path.transport == used
        assert again.path.prefill_cached_tokens == 148  # of 150; the last block is computed anew
        if not colocated:
            assert again.path.decode_cached_tokens == 148
            assert again.path.transferred_bytes == cluster.workers[0].engine.layout.block_bytes, "one block of 38 travels"


@pytest.fixture
def calibrated(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model, ready for int8 in a store of the test's own."""
    monkeypatch.setenv("SEGUE_HOME", str(tmp_path))
    ensure_calibrated(tiny_model_dir, lambda _message, _share: None)
    return tiny_model_dir


@pytest.mark.parametrize(
    "formats", [{"quantization": "int8"}, {"quantization": "int8", "kv_dtype": "int8"}, {"quantization": "int4"}]
)
async def test_quantized_tokens_are_the_same_every_way(valkey: Valkey, calibrated: Path, formats: dict[str, str]) -> None:
    async with in_process_cluster(valkey.url, calibrated, colocated=True, **formats) as cluster:
        greedy = await answers(cluster.client, GREEDY, together=False)
        seeded = await answers(cluster.client, SEEDED, together=False)
    async with in_process_cluster(valkey.url, calibrated, **formats) as cluster:
        assert await answers(cluster.client, GREEDY, together=True) == greedy
        assert await answers(cluster.client, SEEDED, together=True) == seeded


async def test_each_phase_may_hold_its_weights_in_a_format_of_its_own(valkey: Valkey, calibrated: Path) -> None:
    async with in_process_cluster(valkey.url, calibrated, quantization="int8") as cluster:
        int8 = await answers(cluster.client, GREEDY, together=True)
    async with in_process_cluster(valkey.url, calibrated, quantization="int8", decode_quantization="int4") as cluster:
        mixed = await answers(cluster.client, GREEDY, together=True)
    # Prefill samples the first token of each; decode goes on in its own format, over KV that prefill computed.
    assert [tokens[0] for tokens in mixed] == [tokens[0] for tokens in int8]
    assert mixed != int8


@pytest.mark.parametrize("kv_transport", ["shm", "tcp"])
async def test_each_phase_may_cut_its_kv_into_blocks_of_its_own(
    valkey: Valkey, tiny_model_dir: Path, reference_tokens: list[tuple[int, ...]], kv_transport: str
) -> None:
    sizes = {"block_size": 4, "decode_block_size": 16}
    async with in_process_cluster(valkey.url, tiny_model_dir, kv_transport=kv_transport, **sizes) as cluster:
        assert await answers(cluster.client, GREEDY, together=True) == reference_tokens
        assert await answers(cluster.client, GREEDY, together=False) == reference_tokens


async def test_kv_may_be_converted_on_its_way(
    valkey: Valkey, tiny_model_dir: Path, reference_tokens: list[tuple[int, ...]]
) -> None:
    """Prefill computes in float32, decode stores bfloat16: both transports convert to the same numbers."""
    ways = []
    for transport in ("shm", "tcp"):
        formats = {"decode_kv_dtype": "bfloat16", "kv_wire": "bfloat16", "kv_transport": transport}
        async with in_process_cluster(valkey.url, tiny_model_dir, **formats) as cluster:
            ways.append(await answers(cluster.client, GREEDY, together=False))
    assert ways[0] == ways[1]
    assert [tokens[0] for tokens in ways[0]] == [tokens[0] for tokens in reference_tokens]


async def test_two_workers_of_each_role(valkey: Valkey, tiny_model_dir: Path, reference_tokens: list[tuple[int, ...]]) -> None:
    async with in_process_cluster(valkey.url, tiny_model_dir, prefill=2, decode=2) as cluster:
        assert await answers(cluster.client, GREEDY, together=True) == reference_tokens
        loads = [worker.load() for worker in cluster.workers]
        assert all(load.prefilled_tokens or load.decoded_tokens for load in loads), "the burst was spread"


@pytest.mark.parametrize("colocated", [False, True])
async def test_memory_for_a_fraction_of_what_runs(
    valkey: Valkey, tiny_model_dir: Path, reference_tokens: list[tuple[int, ...]], colocated: bool
) -> None:
    """Sequences give way to older ones and are computed anew: nothing fails, no token differs."""
    block_bytes = 3 * 2 * 2 * 4 * 8 * 4  # layers, K and V, heads, tokens, head_dim, float32
    async with in_process_cluster(
        valkey.url, tiny_model_dir, colocated=colocated, kv_memory=46 * block_bytes, max_batch=8
    ) as cluster:
        assert await answers(cluster.client, GREEDY, together=True) == reference_tokens
        assert sum(worker.load().preemptions for worker in cluster.workers) > 0


async def test_logprobs_are_the_models_own(valkey: Valkey, tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    prompt = make_prompts()[8]
    async with in_process_cluster(valkey.url, tiny_model_dir) as cluster:
        options = GenerateOptions(max_tokens=6, temperature=0.7, seed=3, num_logprobs=4, ignore_eos=True)
        choice = (await cluster.client.generate(prompt, **options)).choices[0]
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *choice.token_ids]])).logits[0]
    for offset, token in enumerate(choice.tokens):
        expected = logits[len(prompt) - 1 + offset].log_softmax(-1)
        assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-3)
        top = expected.topk(4)
        assert [token_id for token_id, _ in token.top_logprobs] == top.indices.tolist()
        assert [value for _, value in token.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-3)


async def test_an_answer_goes_on_from_any_of_its_tokens(
    valkey: Valkey, tiny_model_dir: Path, seeded_tokens: list[tuple[int, ...]]
) -> None:
    """With all that looks back at what was generated: penalties, the least number of tokens, the sampler's position."""
    prompt, whole = make_prompts()[9], seeded_tokens[9]
    sampling = SamplingParams(**{name: value for name, value in SEEDED.items() if name != "ignore_eos"})
    async with in_process_cluster(valkey.url, tiny_model_dir) as cluster:

        async def rest(num_known: int) -> list[int]:
            request = SequenceRequest(f"s{num_known}", tuple(prompt), sampling, whole[:num_known])
            steps = [step async for step in cluster.front.server.serve(request, SequencePath())]
            assert steps[-1].finish_reason is FinishReason.LENGTH
            return [token.token_id for step in steps for token in step.tokens]

        for num_known in (0, 1, 2, 3, 4, 5, 12, MAX_TOKENS - 2, MAX_TOKENS - 1):
            assert await rest(num_known) == list(whole[num_known:]), num_known
