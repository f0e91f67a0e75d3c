"""`python -m bench.engine`: what one engine computes per second, against what this machine could do at the very best.

Prompts of 128, 1,024 and 4,000 tokens; decoding with 1 to 64 sequences at contexts of 64, 256 and 1,024 tokens. Each figure
stands beside its *floor*: the time that the arithmetic or the reading of memory alone would take, whichever is longer, at the
rates that plain torch operations reach in the same run. Sequences at a context are set up over KV memory filled with noise:
what it holds does not change how long attention takes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import numpy as np
import torch
import typer
from rich.console import Console

from bench.machine import commit, machine_facts
from bench.prompts import random_prompts
from bench.report import Report, Row, median_row, print_report, write_json
from engine.engine import Engine
from engine.layout import kv_layout
from engine.sequence import Sequence
from engine.step import Chunk
from engine.weights import WeightFormats
from segue.config import DEFAULT_MODEL, Dtype, EngineSettings
from segue.errors import SegueError
from segue.kv_layout import DTYPE_BYTES
from segue.models.config import ModelConfig
from segue.models.store import resolve
from segue.sampling import GeneratedToken, SamplingParams

PROMPT_LENGTHS = (128, 1024, 4000)
BATCH_SIZES = (1, 4, 16, 64)
CONTEXT_LENGTHS = (64, 256, 1024)
DECODE_STEPS = 4


@dataclass(frozen=True, slots=True)
class Rates:
    """What plain torch operations reach on the engine's threads."""

    # Multiplications and additions per second in a large matrix product.
    flops: float
    # Bytes read per second from memory that no cache holds.
    bytes: float

    def floor_s(self, num_flops: float, num_bytes: float) -> float:
        """Seconds below which work of this size cannot be done."""
        return max(num_flops / self.flops, num_bytes / self.bytes)


@dataclass(frozen=True, slots=True)
class Work:
    """Arithmetic and memory traffic of one forward pass, counted from the model's shape."""

    config: ModelConfig
    dtype_bytes: int

    @property
    def layer_weights(self) -> int:
        """Elements of the linear layers, without the output head."""
        config = self.config
        heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        return config.num_layers * config.hidden_size * (heads + 3 * config.intermediate_size)

    @property
    def head_weights(self) -> int:
        return self.config.hidden_size * self.config.vocab_size

    def prefill(self, num_tokens: int) -> tuple[float, float]:
        """(operations, bytes read) for one prompt and its first token. Attention is causal: half of all pairs."""
        attention = 2 * num_tokens * num_tokens * self.config.num_heads * self.config.head_dim * self.config.num_layers
        flops = 2 * num_tokens * self.layer_weights + 2 * self.head_weights + attention
        return flops, (self.layer_weights + self.head_weights) * self.dtype_bytes

    def decode(self, batch_size: int, context: int) -> tuple[float, float]:
        """(operations, bytes read) for one step: every weight and every context's KV is read once."""
        config = self.config
        weights = self.layer_weights + self.head_weights
        attention = 4 * batch_size * context * config.num_heads * config.head_dim * config.num_layers
        kv = 2 * batch_size * context * config.num_kv_heads * config.head_dim * config.num_layers
        return 2 * batch_size * weights + attention, (weights + kv) * self.dtype_bytes


def measure_rates(dtype: torch.dtype) -> Rates:
    """The best of a few tries each, on the calling thread's number of torch threads."""
    left, right = torch.randn(1024, 576).to(dtype), torch.randn(576, 3072).to(dtype)
    memory = torch.zeros(2**26)  # 256 MiB of float32
    return Rates(
        flops=2 * 1024 * 576 * 3072 / _best_s(lambda: torch.mm(left, right)),
        bytes=memory.nbytes / _best_s(memory.sum),
    )


def _best_s(work: Callable[[], object], tries: int = 8) -> float:
    def one_s() -> float:
        begin_s = time.perf_counter()
        work()
        return time.perf_counter() - begin_s

    work()
    return min(one_s() for _ in range(tries))


def noise(num_bytes: int) -> memoryview:
    """Bytes that are numbers between 0 and 1 in either format: no infinities, and no zero pages that memory reads for free."""
    return np.random.default_rng(0).integers(0, 0x40, num_bytes, np.uint8).data


class Bench:
    """One loaded engine and the runs measured on it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._prompts = {length: iter(self._endless(length)) for length in PROMPT_LENGTHS}

    def _endless(self, length: int) -> Iterator[list[int]]:
        seed = 0
        while True:
            seed += 1
            yield from random_prompts(8, length, self._engine.config.vocab_size, seed)

    @contextmanager
    def _leased(self, sequences: list[Sequence], num_tokens: int) -> Iterator[None]:
        pool, layout = self._engine.pool, self._engine.layout
        leases = [pool.lease(layout.num_blocks_for(num_tokens)) for _ in sequences]
        try:
            for sequence, lease in zip(sequences, leases, strict=True):
                sequence.lease = lease
            yield
        finally:
            for lease in leases:
                if lease is not None:
                    pool.release(lease)

    async def prefill_tok_s(self, length: int, step_tokens: int) -> float:
        sequence = Sequence("prompt", next(self._prompts[length]), SamplingParams(max_tokens=2, temperature=0.0))
        with self._leased([sequence], length):
            begin_s = time.perf_counter()
            while sequence.num_uncomputed:
                await self._engine.run([Chunk(sequence, min(step_tokens, sequence.num_uncomputed))])
            return length / (time.perf_counter() - begin_s)

    async def decode_tok_s(self, batch_size: int, context: int) -> float:
        params = SamplingParams(max_tokens=DECODE_STEPS + 2, temperature=0.0)
        sequences = [Sequence(row, [7] * context, params, num_computed=context - 1) for row in range(batch_size)]
        with self._leased(sequences, context + DECODE_STEPS + 1):
            await self._step(sequences)  # warms up
            begin_s = time.perf_counter()
            for _ in range(DECODE_STEPS):
                await self._step(sequences)
            return batch_size * DECODE_STEPS / (time.perf_counter() - begin_s)

    async def _step(self, sequences: list[Sequence]) -> None:
        tokens = await self._engine.run([Chunk(sequence, 1) for sequence in sequences])
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.append(token or GeneratedToken(0))


@dataclass(frozen=True, slots=True)
class Case:
    """One figure of the table."""

    metric: str
    floor_tok_s: float
    measure: Callable[[], Awaitable[float]]


def make_cases(bench: Bench, work: Work, rates: Rates, step_tokens: int) -> list[Case]:
    prefill = [
        Case(
            f"prefill_{length}_tok_s",
            length / rates.floor_s(*work.prefill(length)),
            partial(bench.prefill_tok_s, length, step_tokens),
        )
        for length in PROMPT_LENGTHS
    ]
    decode = [
        Case(
            f"decode_b{batch_size}_ctx{context}_tok_s",
            batch_size / rates.floor_s(*work.decode(batch_size, context)),
            partial(bench.decode_tok_s, batch_size, context),
        )
        for batch_size in BATCH_SIZES
        for context in CONTEXT_LENGTHS
    ]
    return prefill + decode


async def run(model: str, *, settings: EngineSettings, repeats: int, console: Console) -> Report:
    handle = resolve(model)
    config = ModelConfig.from_dir(handle.path)
    layout = kv_layout(config, settings, handle.revision)
    num_blocks = max(
        max(BATCH_SIZES) * layout.num_blocks_for(max(CONTEXT_LENGTHS) + DECODE_STEPS + 1),
        layout.num_blocks_for(max(PROMPT_LENGTHS)),
    )
    memory = noise(num_blocks * layout.block_bytes)
    torch.set_num_threads(settings.threads)
    rates = measure_rates(getattr(torch, settings.dtype))
    work = Work(config, DTYPE_BYTES[settings.dtype])
    with Engine.load(handle.path, config, layout, num_blocks, memory, WeightFormats(), threads=settings.threads) as engine:
        cases = make_cases(Bench(engine), work, rates, settings.max_prefill_tokens)
        runs: dict[str, list[float]] = {case.metric: [] for case in cases}
        with console.status("") as state:
            for number in range(repeats):  # the whole table again and again: a slow minute is spread over all of it
                for case in cases:
                    state.update(f"run {number + 1} of {repeats}: {case.metric}")
                    runs[case.metric].append(await case.measure())
    rows = [median_row(case.metric, "tok/s", runs[case.metric], {"floor": [case.floor_tok_s]}) for case in cases]
    rows += [Row("gemm_gflop_s", rates.flops / 1e9, "GFLOP/s"), Row("memory_read_gb_s", rates.bytes / 1e9, "GB/s")]
    facts = {**machine_facts(), "model": handle.name, "dtype": settings.dtype, "threads": settings.threads}
    return Report(facts, commit(), rows)


def main(
    dtype: Annotated[str, typer.Option(help=f"{' or '.join(get_args(Dtype))}.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of the engine.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="How often the whole table is measured.")] = 3,
    model: Annotated[str, typer.Option(help="What `segue up --model` takes.")] = DEFAULT_MODEL,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there as well.")] = None,
) -> None:
    """Measure the engine alone: prefill and decode against the floor of this machine. About two minutes for each repeat."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        settings = EngineSettings.load(flags={"dtype": dtype, "threads": threads}, env={})
        report = asyncio.run(run(model, settings=settings, repeats=repeats, console=console))
    except SegueError as error:
        console.print(f"error: {error.message}", style="red", markup=False)
        raise typer.Exit(1) from None
    print_report(report, console)
    if json_file is not None:
        write_json(report, json_file)


if __name__ == "__main__":
    typer.run(main)
