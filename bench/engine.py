"""`python -m bench.engine`: what one engine computes per second, against what this machine could do at the very best.

Prompts of 128, 1,024 and 4,000 tokens; decoding with 1 to 64 sequences at contexts of 64, 256 and 1,024 tokens. Each figure
stands beside its *floor* (bench/floor.py), measured in the same run, and with --peers beside vLLM's and llama.cpp's on the same
core, each case measured in turns: ours, theirs, ours, ... `python -m bench.peers setup` installs those.

Several formats at once: metrics of the first have plain names (`prefill_1024_tok_s`), those of others end with the format. A
ratio to `vllm_best` or `llama_cpp_best` is one to that peer's fastest format in the case.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bench.engine_runs import BATCH_SIZES, CONTEXT_LENGTHS, PROMPT_LENGTHS, EngineBench, loaded
from bench.floor import HEAD_BYTES, WEIGHT_BYTES, Rates, Work, measure_rates
from bench.machine import commit, machine_facts
from bench.peers.catalog import find_peers
from bench.peers.client import Peer, PeerCannot
from bench.report import Report, Row, median_row, print_report, write_json
from bench.worker_start import start_worker
from segue.config import DEFAULT_MODEL, ClusterSettings, EngineSettings
from segue.errors import ConfigError, SegueError
from segue.kv_layout import DTYPE_BYTES
from segue.models.config import ModelConfig
from segue.models.store import ModelHandle, resolve

# What `worker_rss_mb` is measured with.
_RSS_KV_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Case:
    """One figure for each format and peer. For prefill `batch_size` is 0 and `length` the prompt's."""

    metric: str
    batch_size: int
    length: int

    @property
    def num_tokens(self) -> int:
        """Tokens that one measured time stands for."""
        return self.batch_size or self.length

    def floor_s(self, work: Work, rates: Rates) -> float:
        if self.batch_size:
            return work.decode_floor_s(self.batch_size, self.length, rates)
        return work.prefill_floor_s(self.length, rates)

    async def engine_s(self, bench: EngineBench) -> float:
        return await (bench.decode_step_s(self.batch_size, self.length) if self.batch_size else bench.prefill_s(self.length))

    async def peer_s(self, peer: Peer) -> float:
        ask = (
            partial(peer.decode_step_s, self.batch_size, self.length)
            if self.batch_size
            else partial(peer.prefill_s, self.length)
        )
        return await asyncio.to_thread(ask)


def make_cases(beginnings: list[str]) -> list[Case]:
    """Those whose metrics begin with one of `beginnings`; all if there are none. Raises ConfigError when nothing is left."""
    cases = [case for case in _all_cases() if not beginnings or case.metric.startswith(tuple(beginnings))]
    if not cases:
        raise ConfigError(
            f"cases: no metric begins with {' or '.join(beginnings)}; there are prefill_1024, decode_b16_ctx256, ..."
        )
    return cases


def _all_cases() -> list[Case]:
    prefill = [Case(f"prefill_{length}_tok_s", 0, length) for length in PROMPT_LENGTHS]
    return prefill + [
        Case(f"decode_b{batch}_ctx{context}_tok_s", batch, context) for batch in BATCH_SIZES for context in CONTEXT_LENGTHS
    ]


@dataclass(slots=True)
class Contender:
    """An engine format or a peer, and the tokens per second that it reached in each case."""

    name: str
    measure: Callable[[Case], Awaitable[float]]
    runs: dict[str, list[float]] = field(default_factory=dict)


def engine_settings(weights: str, threads: int, kv_dtype: str) -> EngineSettings:
    """`weights`: a key of WEIGHT_BYTES."""
    if weights not in WEIGHT_BYTES:
        raise ConfigError(f"formats: {weights!r} is none of {', '.join(WEIGHT_BYTES)}")
    is_quantized = weights.startswith("int")
    flags = {
        "dtype": "float32" if is_quantized else weights,
        "quantization": weights if is_quantized else "none",
        "kv_dtype": kv_dtype,
        "threads": threads,
    }
    return EngineSettings.load(flags=flags, env={})


async def measure(contenders: list[Contender], cases: list[Case], repeats: int, tell: Callable[[str], None]) -> None:
    """The whole table again and again, and within a case one contender after the other: a slow minute hits all alike."""
    for number in range(repeats):
        for case in cases:
            for contender in contenders:
                tell(f"run {number + 1} of {repeats}: {case.metric}, {contender.name}")
                try:
                    seconds = await contender.measure(case)
                except PeerCannot:
                    continue
                contender.runs.setdefault(case.metric, []).append(case.num_tokens / seconds)


def make_rows(
    cases: list[Case], own: list[Contender], peers: list[Contender], floors: Mapping[str, Mapping[str, float]]
) -> Iterator[Row]:
    """`floors`: tokens per second by format and metric."""
    for case in cases:
        runs = {peer.name: peer.runs[case.metric] for peer in peers if case.metric in peer.runs}
        rates = {name: median_row(name, "tok/s", values).value for name, values in runs.items()}
        for kind in ("vllm", "llama_cpp"):
            if of_kind := [name for name in rates if name.startswith(kind)]:
                runs[f"{kind}_best"] = runs[max(of_kind, key=rates.__getitem__)]
        for index, contender in enumerate(own):
            others = {"floor": [floors[contender.name][case.metric]], **runs}
            metric = case.metric if index == 0 else f"{case.metric}_{contender.name}"
            yield median_row(metric, "tok/s", contender.runs[case.metric], others)
        for name, values in runs.items():
            if not name.endswith("_best"):
                yield median_row(f"{case.metric}_{name}", "tok/s", values)


@dataclass(slots=True)
class Ground:
    """What the contenders of a run have in common, and what is found out about them on the way."""

    handle: ModelHandle
    config: ModelConfig
    cases: list[Case]
    facts: dict[str, object]
    # What the machine reaches, by metric.
    rates: dict[str, Row] = field(default_factory=dict)
    # Tokens per second at the floor, by format and metric.
    floors: dict[str, dict[str, float]] = field(default_factory=dict)


async def run(
    handle: ModelHandle,
    cases: list[Case],
    settings: Mapping[str, EngineSettings],
    peer_names: list[str] | None,
    repeats: int,
    console: Console,
) -> Report:
    """`settings` by format, the main one first. `peer_names`: those to measure, all that are found if empty, none if None."""
    ground = Ground(handle, ModelConfig.from_dir(handle.path), cases, {**machine_facts(), "model": handle.name})
    with ExitStack() as stack:
        peers = [] if peer_names is None else start_peers(stack, ground, peer_names, console)
        own = [load_engine(stack, ground, weights, engine) for weights, engine in settings.items()]
        with console.status("") as state:
            await measure(own + peers, ground.cases, repeats, state.update)
    rows = [*make_rows(ground.cases, own, peers, ground.floors), *ground.rates.values()]
    return Report(ground.facts, commit(), rows)


def start_peers(stack: ExitStack, ground: Ground, names: list[str], console: Console) -> list[Contender]:
    """The peers that are found, pinned to one core; and this process to the same one."""
    core = min(os.sched_getaffinity(0))
    peers = []
    for spec in find_peers():
        if not names or spec.name in names:
            with console.status(f"starting {spec.name}"):
                peer = stack.enter_context(Peer(spec, core))
            ground.facts[spec.name] = peer.facts.get("version", "?")
            peers.append(Contender(spec.name, partial(_peer_s, peer)))
    os.sched_setaffinity(0, {core})
    return peers


def load_engine(stack: ExitStack, ground: Ground, weights: str, settings: EngineSettings) -> Contender:
    torch.set_num_threads(settings.threads)
    bench = stack.enter_context(loaded(ground.handle.path, ground.config, ground.handle.revision, settings))
    kernels = bench.engine.decoder.kernels
    rates = measure_rates(weights, kernels)
    kv_bytes = DTYPE_BYTES[bench.engine.layout.dtype]
    work = Work(ground.config, WEIGHT_BYTES[weights], HEAD_BYTES[weights], kv_bytes)
    ground.floors[weights] = {case.metric: case.num_tokens / case.floor_s(work, rates) for case in ground.cases}
    for row in (
        Row(f"product_{weights}_gop_s", rates.product_ops / 1e9, "GOP/s"),
        Row("product_float32_gop_s", rates.float_ops / 1e9, "GOP/s"),
        Row("memory_read_gb_s", rates.bytes / 1e9, "GB/s"),
    ):
        ground.rates.setdefault(row.metric, row)
    ground.facts |= {"kernels": kernels.name, "threads": settings.threads}
    return Contender(weights, partial(_engine_s, bench))


async def _engine_s(bench: EngineBench, case: Case) -> float:
    return await case.engine_s(bench)


async def _peer_s(peer: Peer, case: Case) -> float:
    return await case.peer_s(peer)


async def start_rows(handle: ModelHandle, engine: EngineSettings) -> list[Row]:
    """A worker with room for 16,384 tokens of bfloat16 KV."""
    config = ModelConfig.from_dir(handle.path)
    kv_memory = _RSS_KV_TOKENS * 4 * config.num_layers * config.num_kv_heads * config.head_dim
    flags = engine.model_dump() | {"kv_dtype": "bfloat16", "kv_memory": kv_memory}
    start = await start_worker(handle, ClusterSettings.load(flags=flags, env={}))
    return [Row("worker_ready_s", start.ready_s, "s"), Row("worker_rss_mb", start.rss_mb, "MB")]


def main(
    formats: Annotated[str, typer.Option(help=f"Of {', '.join(WEIGHT_BYTES)}: one or several, by commas.")] = "int8",
    kv_dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or int8.")] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="Compute threads of the engine.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="How often the whole table is measured.")] = 3,
    model: Annotated[str, typer.Option(help="What `segue up --model` takes.")] = DEFAULT_MODEL,
    peers: Annotated[bool, typer.Option("--peers", help="Measure vLLM and llama.cpp as well, all on one core.")] = False,
    only_peers: Annotated[str, typer.Option(help="Of the peers only these, by commas, such as vllm_w8a8,llama_cpp_q4_0.")] = "",
    cases: Annotated[str, typer.Option(help="Only metrics that begin so, by commas, such as prefill_1024,decode_b1.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there as well.")] = None,
) -> None:
    """Measure the engine alone: prefill and decode against the floor of this machine. About two minutes for each repeat."""
    console = Console(highlight=False, soft_wrap=True)
    peer_names, beginnings = ([name for name in names.split(",") if name] for names in (only_peers, cases))
    try:
        settings = {name: engine_settings(name, threads, kv_dtype) for name in formats.split(",")}
        handle = resolve(model)
        report = asyncio.run(run(handle, make_cases(beginnings), settings, peer_names if peers else None, repeats, console))
        starts = asyncio.run(start_rows(handle, next(iter(settings.values()))))
    except SegueError as error:
        console.print(f"error: {error.message}", style="red", markup=False)
        raise typer.Exit(1) from None
    report = Report(report.machine, report.commit, [*report.rows, *starts])
    print_report(report, console)
    if json_file is not None:
        write_json(report, json_file)


if __name__ == "__main__":
    typer.run(main)
