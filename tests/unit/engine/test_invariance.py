"""How a sequence is computed, chunked, cached, batched, in blocks of whatever size, does not change its tokens."""

from __future__ import annotations

import pytest
import torch

from engine.step import Chunk, prepare_step

NUM_TOKENS = 10
SEEDED = {"temperature": 0.9, "seed": 1234, "top_p": 0.95}
NAMES = ["llama", "qwen3"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_chunk", [1, 3, 4, 16])
async def test_chunked_prefill(name, max_chunk, checkpoint, prompts):
    with checkpoint(name).engine() as runner:
        for prompt in prompts:
            whole = await runner.generate(prompt, NUM_TOKENS)
            assert await runner.generate(prompt, NUM_TOKENS, max_chunk=max_chunk) == whole


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_size", [1, 3, 64])
async def test_block_size(name, block_size, checkpoint, prompts):
    model = checkpoint(name)
    with model.engine(block_size=4) as runner:
        expected = [await runner.generate(prompt, NUM_TOKENS, **SEEDED) for prompt in prompts]
    with model.engine(block_size=block_size) as runner:
        assert [await runner.generate(prompt, NUM_TOKENS, **SEEDED) for prompt in prompts] == expected


@pytest.mark.parametrize("options", [{}, SEEDED])
@pytest.mark.parametrize("max_chunk", [1000, 5])
async def test_batched_with_others(options, max_chunk, checkpoint, prompts):
    with checkpoint("llama").engine() as runner:
        alone = [await runner.generate(prompt, NUM_TOKENS, **options) for prompt in prompts]
        together = [runner.start(prompt, NUM_TOKENS, **options) for prompt in prompts]
        assert await runner.finish(together, max_chunk=max_chunk) == alone
        reversed_order = [runner.start(prompt, NUM_TOKENS, **options) for prompt in reversed(prompts)]
        assert await runner.finish(reversed_order, max_chunk=max_chunk) == alone[::-1]


async def test_decoding_beside_a_prefill(checkpoint, prompts):
    """Single tokens and long chunks, started and continued, in the same step."""
    with checkpoint("qwen2").engine() as runner:
        alone = [await runner.generate(prompt, NUM_TOKENS) for prompt in prompts]
        running = [runner.start(prompt, NUM_TOKENS) for prompt in prompts[:3]]
        for sequence in running:
            await runner.step([Chunk(sequence, sequence.num_uncomputed)])
        running.insert(1, runner.start(prompts[4], NUM_TOKENS))
        running.insert(0, runner.start(prompts[3], NUM_TOKENS))
        assert await runner.finish(running, max_chunk=6) == [alone[3], alone[0], alone[4], alone[1], alone[2]]


async def test_prefix_hits_change_nothing_but_the_work(checkpoint, prompts):
    with checkpoint("llama").engine() as runner:
        prompt = prompts[4]
        first = await runner.generate(prompt, NUM_TOKENS, reuse_prefix=True, **SEEDED)
        again = runner.start(prompt, NUM_TOKENS, reuse_prefix=True, **SEEDED)
        assert again.num_computed == (len(prompt) - 1) // 4 * 4
        # Another prompt with the same beginning, while the first one still holds the shared blocks.
        fork = [*prompt[:22], *prompts[3]]
        forked = runner.start(fork, NUM_TOKENS, reuse_prefix=True)
        assert forked.num_computed == 20
        tokens = await runner.finish([again, forked])
    with checkpoint("llama").engine() as runner:
        assert tokens == [first, await runner.generate(fork, NUM_TOKENS)]


async def test_a_sequence_that_began_elsewhere_goes_on_the_same(checkpoint, prompts):
    with checkpoint("llama").engine() as runner:
        whole = await runner.generate(prompts[3], NUM_TOKENS, **SEEDED)
        resumed = runner.start(prompts[3] + whole[:5], NUM_TOKENS, **SEEDED)
        resumed.num_prompt_tokens = len(prompts[3])
        assert await runner.finish([resumed]) == [whole]


async def test_kv_of_another_worker_serves_as_ones_own(checkpoint, prompts):
    """Blocks copied byte for byte, into other block ids, as a hand-over does."""
    model, prompt = checkpoint("llama3_rope"), prompts[4]
    with model.engine() as prefill, model.engine() as decode:
        expected = await prefill.generate(prompt, NUM_TOKENS)
        decode.engine.pool.lease(3)
        source, target = prefill.start(prompt, NUM_TOKENS), decode.start(prompt, NUM_TOKENS)
        (first,) = await prefill.step([Chunk(source, len(prompt))])
        assert first is not None
        for layer, target_layer in zip(_layers(prefill), _layers(decode), strict=True):
            target_layer[list(target.lease.block_ids)] = layer[list(source.lease.block_ids)]
        target.append(first)
        target.num_computed = len(prompt)
        assert await decode.finish([target]) == [expected]


def _layers(runner):
    """The KV memory of each layer: [num_blocks, ...]"""
    return runner.engine.decoder.kernels.cache.layers


@pytest.mark.parametrize("name", ["llama_biases", "qwen3"])
def test_bfloat16_is_close_to_transformers(name, checkpoint, prompts):
    model = checkpoint(name)
    with model.engine(dtype="bfloat16") as runner:
        layout = runner.engine.layout
        for prompt in prompts:
            step = prepare_step([Chunk(runner.start(prompt, 1), len(prompt))], layout)
            with torch.inference_mode():
                logits = runner.engine.decoder.forward(step)[0]
            exact = model.logits(prompt)
            assert logits.dtype == torch.float32
            assert (logits - exact).abs().max() < 0.06 * exact.abs().max()
