"""`python -m bench.overhead`: what splitting prefill from decode costs where it cannot gain, one request at a time.

A disaggregated cluster (one prefill and one decode worker) and a colocated one (one worker with both roles) are up at the same
time, at equal threads for each worker, and take turns with the same prompts. Nothing competes for the machine, so splitting has
only its costs to show: TTFT must not rise by more than a tenth.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console

from bench.local_cluster import LocalCluster
from bench.machine import commit, machine_facts
from bench.prompts import random_prompts
from bench.report import Report, Row, median_row, print_report, ratio_row, write_json
from segue.client import AsyncClient, Completed, Event, Output, RequestPath
from segue.config import DEFAULT_MODEL, Dtype, KVTransport
from segue.errors import InternalError, SegueError

NUM_OUTPUT_TOKENS = 16
TARGET_RATIO = 1.10


@dataclass(frozen=True, slots=True)
class Timing:
    """What a client saw of one request, and what the cluster said of its path. Seconds."""

    ttft_s: float
    # Between one message with tokens and the next.
    gaps_s: tuple[float, ...]
    path: RequestPath


@dataclass(slots=True)
class Timings:
    """All requests to one system, in order."""

    timings: list[Timing] = field(default_factory=list)

    @property
    def ttft_ms(self) -> list[float]:
        return [timing.ttft_s * 1e3 for timing in self.timings]

    @property
    def gaps_ms(self) -> list[float]:
        return [gap_s * 1e3 for timing in self.timings for gap_s in timing.gaps_s]

    @property
    def handover_ms(self) -> list[float]:
        return [timing.path.handover_s * 1e3 for timing in self.timings]


class Stopwatch:
    """Turns the events of one request, as they come, into its Timing. Starts when it is made."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._begin_s = clock()
        self._token_times_s: list[float] = []
        self._path: RequestPath | None = None

    def see(self, event: Event) -> None:
        match event:
            case Output(tokens=tokens) if tokens:
                self._token_times_s.append(self._clock())
            case Completed(paths=paths):
                self._path = paths[0]

    def timing(self) -> Timing:
        """Raises InternalError for a request that ended without tokens or without its path."""
        if self._path is None or not self._token_times_s:
            raise InternalError("a request ended without tokens or without its path")
        times_s = self._token_times_s
        gaps_s = tuple(later - earlier for earlier, later in pairwise(times_s))
        return Timing(times_s[0] - self._begin_s, gaps_s, self._path)


async def measure(
    clients: Sequence[AsyncClient], prompts: Iterable[Sequence[int]], note: Callable[[str], None]
) -> list[Timings]:
    """Sends each prompt to each client in turn, one at a time. The first prompt only warms up."""
    results = [Timings() for _ in clients]
    for number, prompt in enumerate(prompts):
        for client, result in zip(clients, results, strict=True):
            timing = await _time_request(client, prompt)
            if number:
                result.timings.append(timing)
        note(f"request {number} of each system" if number else "warmed up")
    return results


async def _time_request(client: AsyncClient, prompt: Sequence[int]) -> Timing:
    watch = Stopwatch()
    async for event in client.stream(prompt, max_tokens=NUM_OUTPUT_TOKENS, temperature=0, ignore_eos=True):
        watch.see(event)
    timing = watch.timing()
    if timing.path.prefill_cached_tokens or timing.path.decode_cached_tokens:
        raise InternalError("a prompt hit a prefix cache: what was measured is not the work of a prompt")
    return timing


def rows(disaggregated: Timings, colocated: Timings, num_prompt_tokens: int) -> list[Row]:
    split, whole, size = disaggregated, colocated, num_prompt_tokens
    return [
        median_row(f"ttft_disaggregated_ms_{size}", "ms", split.ttft_ms, {"colocated": whole.ttft_ms}),
        median_row(f"ttft_colocated_ms_{size}", "ms", whole.ttft_ms),
        ratio_row(f"ttft_disaggregated_over_colocated_{size}", split.ttft_ms, whole.ttft_ms),
        median_row(f"handover_disaggregated_ms_{size}", "ms", split.handover_ms, {"colocated": whole.handover_ms}),
        median_row(f"handover_colocated_ms_{size}", "ms", whole.handover_ms),
        median_row(f"inter_token_disaggregated_ms_{size}", "ms", split.gaps_ms, {"colocated": whole.gaps_ms}),
        median_row(f"inter_token_colocated_ms_{size}", "ms", whole.gaps_ms),
    ]


async def run(
    model: str, *, num_requests: int, num_prompt_tokens: int, transport: KVTransport, dtype: Dtype, console: Console
) -> Report:
    with console.status("starting two clusters") as state:
        split_cluster = LocalCluster(model, dtype=dtype, kv_transport=transport, threads=1)
        whole_cluster = LocalCluster(model, dtype=dtype, colocated=True, threads=1)
        async with split_cluster, whole_cluster:
            async with AsyncClient(split_cluster.grpc_address) as split, AsyncClient(whole_cluster.grpc_address) as whole:
                vocab_size = (await split.models())[0].vocab_size
                prompts = random_prompts(num_requests + 1, num_prompt_tokens, vocab_size)
                disaggregated, colocated = await measure((split, whole), prompts, state.update)
    used = disaggregated.timings[0].path.transport
    facts = {**machine_facts(), "model": Path(model).name, "dtype": dtype, "threads_per_worker": 1, "transport": used}
    return Report(facts, commit(), rows(disaggregated, colocated, num_prompt_tokens))


def verdict(report: Report) -> str:
    ratio = next(row for row in report.rows if row.metric.startswith("ttft_disaggregated_over_colocated")).value
    word = "met" if ratio <= TARGET_RATIO else "missed"
    return f"TTFT disaggregated over colocated {ratio:.3f}; target at most {TARGET_RATIO:.2f}: {word}"


def main(
    requests: Annotated[int, typer.Option(min=1, help="Requests to each system.")] = 10,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    transport: Annotated[str, typer.Option(help=f"How KV travels: {', '.join(get_args(KVTransport))}.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"{' or '.join(get_args(Dtype))}.")] = "float32",
    model: Annotated[str, typer.Option(help="What `segue up --model` takes.")] = DEFAULT_MODEL,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there as well.")] = None,
) -> None:
    """Measure what disaggregation costs a lone request: TTFT against a colocated cluster."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        report = asyncio.run(
            run(
                model,
                num_requests=requests,
                num_prompt_tokens=prompt_tokens,
                transport=transport,  # type: ignore[arg-type]  # checked with the cluster's settings
                dtype=dtype,  # type: ignore[arg-type]
                console=console,
            )
        )
    except SegueError as error:
        console.print(f"error: {error.message}", style="red", markup=False)
        raise typer.Exit(1) from None
    print_report(report, console)
    console.print(verdict(report), style="bold")
    if json_file is not None:
        write_json(report, json_file)


if __name__ == "__main__":
    typer.run(main)
