"""Ranks that share a model give the tokens of one that has it alone, hold their own heads' KV, and end together."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from engine import parallel
from engine.block_pool import Lease
from engine.parallel import RankGroup, Shard
from engine.sequence import Sequence
from engine.step import Chunk, prepare_step
from engine.step_words import pack_step, unpack_step
from segue.errors import ConfigError, WorkerLost
from segue.kv_layout import KVLayout
from segue.sampling import SamplingParams
from tests.unit.engine.conftest import Checkpoint

FORMATS = [
    pytest.param({"dtype": "bfloat16"}, id="bfloat16"),
    pytest.param({"quantization": "int8", "kv_dtype": "int8"}, id="int8"),
    pytest.param({"quantization": "int4"}, id="int4"),
]


async def logits_of(runner, prompts):
    """Of all steps until each prompt has five more tokens: [sequences that end in the step, vocab] each."""
    found, forward = [], runner.engine._forward

    def record(step, on_layer):
        logits = forward(step, on_layer)
        found.append(logits.clone())
        return logits

    runner.engine._forward = record
    tokens = await runner.finish([runner.start(prompt, 5) for prompt in prompts], max_chunk=7)
    return tokens, found


async def assert_same_bits(alone, ranks, prompts):
    if alone.engine.decoder.kernels.name == "torch":
        pytest.skip("the torch reference promises equality up to rounding only")
    tokens, logits = await logits_of(alone, prompts)
    tokens_of_ranks, logits_of_ranks = await logits_of(ranks, prompts)
    assert tokens_of_ranks == tokens
    for one, other in zip(logits, logits_of_ranks, strict=True):
        assert torch.equal(one, other)
    whole, caches = alone.engine.decoder.kernels.cache, ranks.caches
    for layer, expected in enumerate(whole.layers):
        assert torch.equal(torch.cat([cache.layers[layer] for cache in caches], 2), expected)


@pytest.mark.parametrize("name", ["llama", "llama_biases", "mistral", "qwen3_biases"])
async def test_two_ranks_compute_the_bits_of_one(name, checkpoint, prompts):
    """Biases, norms of heads, tied heads: whatever a model may have."""
    with checkpoint(name).engine() as alone, checkpoint(name).ranks(2) as ranks:
        await assert_same_bits(alone, ranks, prompts)


@pytest.mark.parametrize("options", FORMATS)
async def test_four_ranks_in_every_format(options, checkpoint, prompts):
    model = checkpoint("llama_4_kv_heads")
    with model.engine(**options) as alone, model.ranks(4, **options) as ranks:
        await assert_same_bits(alone, ranks, prompts)


async def test_the_real_model_cut_in_three(real_model_dir):
    model, options = Checkpoint(real_model_dir, None), {"dtype": "bfloat16", "num_blocks": 16}
    assert model.config.tensor_parallel_degrees == (1, 3)
    with model.engine(**options) as alone, model.ranks(3, **options) as ranks:
        await assert_same_bits(alone, ranks, [list(range(1000, 1012))])


async def test_the_torch_kernels_agree_up_to_rounding(checkpoint, prompts):
    model = checkpoint("llama_4_kv_heads")
    with model.engine(kernels="torch") as alone, model.ranks(4, kernels="torch") as ranks:
        (tokens, logits), (tokens_of_ranks, logits_of_ranks) = [await logits_of(runner, prompts) for runner in (alone, ranks)]
    assert tokens == tokens_of_ranks
    torch.testing.assert_close(logits, logits_of_ranks)


async def test_a_layer_is_told_of_once_every_rank_has_its_kv(checkpoint):
    """So each may send its own."""
    with checkpoint("llama_4_kv_heads").ranks(4) as ranks:
        before = [[layer.clone() for layer in cache.layers] for cache in ranks.caches]
        written = []

        def on_layer(index):
            written.append(
                (
                    index,
                    [bool((cache.layers[index] != old[index]).any()) for cache, old in zip(ranks.caches, before, strict=True)],
                )
            )

        await ranks.engine.run([Chunk(ranks.start([5, 6, 7], 1), 3)], on_layer)
    assert written == [(index, [True] * 4) for index in range(3)]
    await asyncio.gather(*ranks.following)


def in_ranks(size, work):
    """What `work(group)` gives on each of `size` ranks."""
    store = HashStore()
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(lambda rank: work(RankGroup(store, Shard(rank, size))), range(size)))


@pytest.mark.parametrize(("width", "num_parts"), [(12, 1), (10, 1), (9, 1), (24, 2)])
@pytest.mark.parametrize("num_rows", [0, 3])
def test_every_rank_gets_all_columns(width, num_parts, num_rows):
    whole = torch.randn(num_rows, num_parts, width // num_parts)
    for joined in in_ranks(
        4, lambda group: group.join(whole[:, :, group.shard.part(width // num_parts)].flatten(1), width, num_parts)
    ):
        assert torch.equal(joined, whole.flatten(1))


@st.composite
def steps(draw):
    chunks = []
    for number in range(draw(st.integers(1, 6))):
        tokens = draw(st.lists(st.integers(0, 200_000), min_size=1, max_size=20))
        computed = draw(st.integers(0, len(tokens) - 1))
        lease = Lease(draw(st.lists(st.integers(0, 2**31 - 1), min_size=5, max_size=9)), 0)
        sequence = Sequence(number, tokens, SamplingParams(max_tokens=1), lease=lease, num_computed=computed)
        chunks.append(Chunk(sequence, draw(st.integers(1, len(tokens) - computed))))
    return prepare_step(chunks, KVLayout(1, 1, 2, 4, "float32", "test"))


@given(steps())
def test_a_step_arrives_as_it_was_sent(step):
    arrived = unpack_step(pack_step(step))
    assert torch.equal(arrived.token_ids, step.token_ids)
    assert torch.equal(arrived.positions, step.positions)
    assert torch.equal(arrived.sampled_rows, step.sampled_rows)
    assert arrived.num_decoding == step.num_decoding
    for one, other in zip(arrived.pieces, step.pieces, strict=True):
        assert (one.first_row, one.start, one.end) == (other.first_row, other.start, other.end)
        assert one.lease.block_ids == other.lease.block_ids


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_a_rank_that_fails_takes_the_others_with_it(failing, checkpoint, monkeypatch):
    """None waits in a collective for one that will not come as long as it would have waited for a slow one."""
    monkeypatch.setattr(parallel, "_PATIENCE", timedelta(seconds=60))
    with checkpoint("llama_4_kv_heads").ranks(4) as ranks:
        failed = ranks.engines[failing].decoder.kernels

        def attend(*_):
            raise RuntimeError("out of memory")

        sequence = ranks.start([5, 6, 7], 4)
        await ranks.engine.run([Chunk(sequence, 1)])
        monkeypatch.setattr(failed, "attend", attend)
        async with asyncio.timeout(30):
            with pytest.raises(WorkerLost, match="rank 0 of 4 cannot go on"):
                await ranks.engine.run([Chunk(sequence, 2)])
            errors = await asyncio.gather(*ranks.following, return_exceptions=True)
        assert [type(error) for error in errors] == [WorkerLost] * 3
        assert sequence.num_computed == 1
        with pytest.raises(WorkerLost, match="lost a rank"):
            await ranks.engine.run([Chunk(sequence, 2)])
        ranks.release(sequence)


async def test_a_hook_that_fails_ends_the_group(checkpoint):
    with checkpoint("llama_4_kv_heads").ranks(2) as ranks:

        def fail(_layer):
            raise OSError("the peer is gone")

        with pytest.raises(OSError, match="the peer is gone"):
            await ranks.engine.run([Chunk(ranks.start([5, 6, 7], 4), 3)], fail)
        (error,) = await asyncio.gather(*ranks.following, return_exceptions=True)
        assert isinstance(error, WorkerLost)


async def test_chunks_that_cannot_be_computed_leave_the_group_whole(checkpoint):
    with checkpoint("llama_4_kv_heads").ranks(2) as ranks:
        sequence = ranks.start([5, 6, 7], 4)
        with pytest.raises(Exception, match="uncomputed"):
            await ranks.engine.run([Chunk(sequence, 9)])
        (token,) = await ranks.engine.run([Chunk(sequence, 3)])
        assert token is not None


def test_a_rank_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(parallel, "_PATIENCE", timedelta(milliseconds=50))
    others_gave_up = threading.Event()

    def work(group):
        if group.shard.rank == 1:
            assert others_gave_up.wait(20)
            return
        with pytest.raises(WorkerLost), group.together():
            group.join(torch.zeros(1, 4), 8)
        others_gave_up.set()

    in_ranks(2, work)


def test_a_rank_that_does_not_come_is_told(monkeypatch):
    monkeypatch.setattr(parallel, "START_LIMIT", timedelta(milliseconds=50))
    with pytest.raises(WorkerLost, match="not all 2 ranks"):
        RankGroup(HashStore(), Shard(0, 2))


def test_degrees_that_a_model_cannot_have_are_refused_with_those_that_it_can(checkpoint):
    config = checkpoint("llama_4_kv_heads").config
    assert config.tensor_parallel_degrees == (1, 2, 4)
    config.check_tensor_parallel(4, "decode_tp")
    with pytest.raises(ConfigError, match=r"decode_tp: 3 ranks .* 8 heads, 4 kv heads .* takes 1, 2, 4") as caught:
        config.check_tensor_parallel(3, "decode_tp")
    assert caught.value.field == "decode_tp"
