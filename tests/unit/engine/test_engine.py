"""What `run` promises to its callers: order, hooks, failures, cancellation, closing."""

from __future__ import annotations

import asyncio
import threading
import weakref
from dataclasses import replace
from mmap import mmap

import pytest
import torch

from engine.engine import Engine
from engine.kv_cache import KVCache
from engine.layout import kv_layout
from engine.step import Chunk
from engine.weights import WeightFormats
from segue.config import EngineSettings
from segue.errors import ConfigError, InternalError

PROMPT = [5, 6, 7, 8, 9, 10]


@pytest.fixture
def runner(checkpoint):
    with checkpoint("llama").engine() as runner:
        yield runner


async def test_only_chunks_that_end_their_sequence_give_a_token(runner):
    partial, whole = runner.start(PROMPT, 4), runner.start(PROMPT, 4)
    tokens = await runner.engine.run([Chunk(partial, 4), Chunk(whole, 6)])
    assert tokens[0] is None
    assert tokens[1] is not None
    assert (partial.num_computed, whole.num_computed) == (4, 6)
    assert partial.token_ids == whole.token_ids == PROMPT
    (rest,) = await runner.engine.run([Chunk(partial, 2)])
    assert rest == tokens[1]
    assert await runner.engine.run([]) == []


async def test_each_layer_is_told_of_once_its_kv_is_in_the_cache(runner):
    cache = runner.engine.decoder.kernels.cache
    sequence = runner.start(PROMPT, 4)
    before = [layer.clone() for layer in cache.layers]
    changed = []

    def on_layer(layer):
        now = [bool((slabs != old).any()) for slabs, old in zip(cache.layers, before, strict=True)]
        changed.append((layer, now, threading.current_thread().name))

    await runner.engine.run([Chunk(sequence, 6)], on_layer)
    assert [(layer, now) for layer, now, _ in changed] == [
        (0, [True, False, False]),
        (1, [True, True, False]),
        (2, [True, True, True]),
    ]
    assert {name for _, _, name in changed} == {"engine_0"}
    # Nothing outside the sequence's two blocks was written, and of the second only the two slots used.
    for index, old in enumerate(before):
        assert (cache.layers[index][2:] == old[2:]).all()
        for numbers in (cache.keys(index)[1, ..., 2:], cache.values(index)[1, :, 2:]):
            assert (numbers.contiguous().view(torch.uint8) == 0x42).all()


async def test_a_failed_pass_advances_nothing_and_the_next_one_works(runner):
    sequence = runner.start(PROMPT, 4)

    def fail(layer):
        raise OSError("the peer is gone")

    with pytest.raises(OSError, match="the peer is gone"):
        await runner.engine.run([Chunk(sequence, 6)], fail)
    assert sequence.num_computed == 0
    (token,) = await runner.engine.run([Chunk(sequence, 6)])
    assert token is not None
    assert sequence.num_computed == 6


async def test_calls_are_served_in_order(runner):
    sequences = [runner.start(PROMPT, 2) for _ in range(4)]
    ended = []

    async def run(index):
        await runner.engine.run([Chunk(sequences[index], 6)])
        ended.append(index)

    await asyncio.gather(*(run(index) for index in range(4)))
    assert ended == [0, 1, 2, 3]


async def test_a_cancelled_call_ends_only_when_its_pass_has(runner):
    """Else its blocks could go to somebody else while they are still written."""
    sequence, waiting = runner.start(PROMPT, 4), runner.start(PROMPT, 4)
    entered, go_on = threading.Event(), threading.Event()
    layers = []

    def hold(layer):
        entered.set()
        assert go_on.wait(30)
        layers.append(layer)

    task = asyncio.create_task(runner.engine.run([Chunk(sequence, 6)], hold))
    await asyncio.to_thread(entered.wait, 30)
    queued = asyncio.create_task(runner.engine.run([Chunk(waiting, 6)], layers.append))
    await asyncio.sleep(0)
    for _ in range(3):
        task.cancel()
        queued.cancel()
        done, _ = await asyncio.wait({task}, timeout=0.01)
        assert not done
    # A pass that has not begun is given up at once, and never computed.
    with pytest.raises(asyncio.CancelledError):
        await queued
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert layers == [0, 1, 2]
    assert sequence.num_computed == waiting.num_computed == 0


async def test_chunks_that_cannot_be_computed_are_refused(runner):
    sequence = runner.start(PROMPT, 4)
    for num_tokens in (0, 7):
        with pytest.raises(InternalError, match="uncomputed"):
            await runner.engine.run([Chunk(sequence, num_tokens)])
    lease, sequence.lease = sequence.lease, runner.engine.pool.lease(1)
    with pytest.raises(InternalError, match="2 blocks"):
        await runner.engine.run([Chunk(sequence, 6)])
    sequence.lease = lease
    runner.engine.pool.release(lease)
    with pytest.raises(InternalError, match="lease"):
        await runner.engine.run([Chunk(sequence, 6)])


class Memory(mmap):
    """An mmap that takes weak references."""


async def test_a_closed_engine_lets_go_of_its_memory(checkpoint):
    model = checkpoint("llama")
    layout = kv_layout(model.config, EngineSettings(block_size=4), "test")
    memory = Memory(-1, 4 * layout.block_bytes)
    engine = Engine.load(model.directory, model.config, KVCache.over(memory, layout, 4), WeightFormats(), threads=1)
    memory_is_held = weakref.ref(memory)
    del memory
    assert memory_is_held()
    engine.close()
    engine.close()
    assert not memory_is_held()
    with pytest.raises(RuntimeError, match="shutdown"):
        await engine.run([Chunk(None, 1)])


def test_memory_and_options_that_do_not_fit_are_refused(checkpoint):
    model = checkpoint("llama")
    # With heads of 48 / 6 elements every block holds whole words; with 6 not.
    assert kv_layout(model.config, EngineSettings(block_size=1, kv_dtype="int8"), "test").slab_bytes == 12
    with pytest.raises(ConfigError, match="block_size"):
        kv_layout(replace(model.config, head_dim=6), EngineSettings(block_size=1, kv_dtype="int8"), "test")
    layout = kv_layout(model.config, EngineSettings(block_size=4), "test")
    buffer = bytearray(4 * layout.block_bytes)
    with pytest.raises(InternalError, match="5 KV blocks need"):
        KVCache.over(buffer, layout, 5)
    with pytest.raises(ConfigError, match="threads"):
        Engine.load(model.directory, model.config, KVCache.over(buffer, layout, 4), WeightFormats(), threads=0)
