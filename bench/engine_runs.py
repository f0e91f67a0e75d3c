"""Prompts and decode steps run on one engine, for bench.engine: `async with loaded(...) as bench`, then its two methods.

Sequences at a context are set up over KV memory filled with noise: what it holds does not change how long attention takes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from bench.prompts import random_prompts
from engine.calibration import ensure_calibrated, load_calibration
from engine.engine import Engine
from engine.kv_cache import KVCache
from engine.layout import kv_layout
from engine.sequence import Sequence
from engine.step import Chunk
from engine.weights import WeightFormats
from segue.config import EngineSettings
from segue.models.config import ModelConfig
from segue.sampling import GeneratedToken, SamplingParams

PROMPT_LENGTHS = (128, 1024, 4000)
BATCH_SIZES = (1, 4, 16, 64)
CONTEXT_LENGTHS = (64, 256, 1024)
DECODE_STEPS = 8


def noise(num_bytes: int) -> memoryview:
    """Bytes that are numbers between 0 and 1 in each format: no infinities, and no zero pages that memory reads for free."""
    return np.random.default_rng(0).integers(0, 0x40, num_bytes, np.uint8).data


@contextmanager
def loaded(model_dir: Path, config: ModelConfig, revision: str, settings: EngineSettings) -> Iterator[EngineBench]:
    """An engine with memory for every case, ended with the block."""
    layout = kv_layout(config, settings, revision)
    num_blocks = max(
        max(BATCH_SIZES) * layout.num_blocks_for(max(CONTEXT_LENGTHS) + DECODE_STEPS + 1),
        layout.num_blocks_for(max(PROMPT_LENGTHS)),
    )
    smoothing = {}
    if settings.quantization != "none":
        ensure_calibrated(model_dir, lambda _message, _share: None)
        smoothing = dict(load_calibration(model_dir))
    formats = WeightFormats(getattr(torch, settings.dtype), settings.quantization, frozenset(settings.keep_float), smoothing)
    cache = KVCache.over(noise(num_blocks * layout.block_bytes), layout, num_blocks)
    with Engine.load(model_dir, config, cache, formats, threads=settings.threads) as engine:
        yield EngineBench(engine, settings.max_prefill_tokens)


class EngineBench:
    def __init__(self, engine: Engine, step_tokens: int) -> None:
        self.engine = engine
        self._step_tokens = step_tokens
        self._prompts = {length: self._endless(length) for length in PROMPT_LENGTHS}

    async def prefill_s(self, length: int) -> float:
        """Seconds for a prompt that was not seen before and its first token."""
        sequence = Sequence("prompt", next(self._prompts[length]), SamplingParams(max_tokens=2, temperature=0.0))
        with self._leased([sequence], length):
            begin_s = time.perf_counter()
            while sequence.num_uncomputed:
                await self.engine.run([Chunk(sequence, min(self._step_tokens, sequence.num_uncomputed))])
            return time.perf_counter() - begin_s

    async def decode_step_s(self, batch_size: int, context: int) -> float:
        """Seconds per step, the median of DECODE_STEPS."""
        params = SamplingParams(max_tokens=DECODE_STEPS + 2, temperature=0.0)
        sequences = [Sequence(row, [7] * context, params, num_computed=context - 1) for row in range(batch_size)]
        with self._leased(sequences, context + DECODE_STEPS + 1):
            await self._step_s(sequences)  # warms up
            return statistics.median([await self._step_s(sequences) for _ in range(DECODE_STEPS)])

    async def _step_s(self, sequences: list[Sequence]) -> float:
        begin_s = time.perf_counter()
        tokens = await self.engine.run([Chunk(sequence, 1) for sequence in sequences])
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token or GeneratedToken(0))
        return time.perf_counter() - begin_s

    @contextmanager
    def _leased(self, sequences: list[Sequence], num_tokens: int) -> Iterator[None]:
        pool, layout = self.engine.pool, self.engine.layout
        leases = [pool.lease(layout.num_blocks_for(num_tokens)) for _ in sequences]
        try:
            for sequence, lease in zip(sequences, leases, strict=True):
                sequence.lease = lease
            yield
        finally:
            for lease in leases:
                if lease is not None:
                    pool.release(lease)

    def _endless(self, length: int) -> Iterator[list[int]]:
        seed = 0
        while True:
            seed += 1
            yield from random_prompts(8, length, self.engine.config.vocab_size, seed)
