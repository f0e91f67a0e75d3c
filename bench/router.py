"""`python -m bench.router`: what a router adds to each answer, and how many tokens one core of it streams.

The router is a real process. Its workers take no time for a prompt and a set time for a step, so that all that a client waits
for until its first token is the router and its links. Tokens are counted against processor time of the router process alone;
with many streams at a time, that says how many a core can stream. With `--peers`, sglang-router takes turns with it (`python -m
bench.peers setup` installs it), in front of HTTP backends that are as fast. It passes bytes through, while Segue's router
detokenizes, looks for stop strings and writes the answer.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import aiohttp
import typer
from rich.console import Console

from bench.fake_cluster import MODEL, fake_cluster
from bench.machine import commit, machine_facts
from bench.peers.sglang_router import sglang_router
from bench.report import Report, Row, median_row, percentile, print_report, write_json
from segue.client import AsyncClient, Output
from segue.errors import SegueError

STEP_MS = 20.0
PROMPT = "What a router adds, " * 5
_ALONE_TOKENS = 16
_CROWD, _CROWD_TOKENS = 64, 128
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")

# Gives the moments at which tokens of one answer came.
Ask = Callable[[int], AsyncIterator[float]]


@dataclass
class System:
    name: str
    ask: Ask
    # Of the router process.
    pid: int
    ttft_ms: list[float] = field(default_factory=list)
    # Beyond the step's own time.
    late_ms: list[float] = field(default_factory=list)
    tokens_per_core_s: list[float] = field(default_factory=list)


async def ask_grpc(client: AsyncClient, num_tokens: int) -> AsyncIterator[float]:
    async with client.stream(PROMPT, max_tokens=num_tokens, ignore_eos=True, temperature=0.0) as events:
        async for event in events:
            if isinstance(event, Output):
                for _ in event.tokens:
                    yield time.perf_counter()


async def ask_sse(http: aiohttp.ClientSession, address: str, num_tokens: int) -> AsyncIterator[float]:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    async with http.post(f"http://{address}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if line.startswith(b"data: {"):
                yield time.perf_counter()


async def alone(system: System, num_requests: int) -> None:
    """One request at a time: how long the first token takes, and how much later than the step the others come."""
    for _ in range(num_requests):
        begin_s = time.perf_counter()
        times_s = [at_s async for at_s in system.ask(_ALONE_TOKENS)]
        system.ttft_ms.append(1000 * (times_s[0] - begin_s))
        # The first step may begin at any moment after the first token.
        system.late_ms += [1000 * (later_s - at_s) - STEP_MS for at_s, later_s in pairwise(times_s[1:])]


async def crowd(system: System) -> None:
    """Many at a time: tokens for each second of the router's processor time."""

    async def count() -> int:
        return len([None async for _ in system.ask(_CROWD_TOKENS)])

    begin_s = cpu_s(system.pid)
    counts = await asyncio.gather(*(count() for _ in range(_CROWD)))
    system.tokens_per_core_s.append(sum(counts) / (cpu_s(system.pid) - begin_s))


def cpu_s(pid: int) -> float:
    """Processor time that a process has taken, of all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS


async def measure(requests: int, rounds: int, peers: bool, note: Callable[[str], None]) -> list[Row]:
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(fake_cluster(step_ms=STEP_MS))
        client = await stack.enter_async_context(AsyncClient(cluster.router.grpc))
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)))
        pid = cluster.router.child.pid
        systems = [
            System("grpc", lambda count: ask_grpc(client, count), pid),
            System("sse", lambda count: ask_sse(http, cluster.router.http, count), pid),
        ]
        if peers:
            peer = await stack.enter_async_context(sglang_router(STEP_MS))
            systems.append(System("sglang_router", lambda count: ask_sse(http, peer.address, count), peer.pid))
        for number in range(rounds):
            for system in systems:
                note(f"round {number + 1} of {rounds}: {system.name}")
                await alone(system, requests)
                await crowd(system)
    return rows(systems)


def rows(systems: list[System]) -> list[Row]:
    found, peer = list[Row](), next((system for system in systems if system.name == "sglang_router"), None)
    for system in systems:
        for percent in (50, 99):
            for metric, values in (("ttft_added", system.ttft_ms), ("token_added", system.late_ms)):
                found.append(Row(f"router_{metric}_ms_p{percent}_{system.name}", percentile(values, percent), "ms"))
        others = {peer.name: peer.tokens_per_core_s} if peer is not None and peer is not system else {}
        found.append(median_row(f"router_stream_tok_s_{system.name}", "tok/s/core", system.tokens_per_core_s, others))
    return found


def main(
    requests: Annotated[int, typer.Option(min=2, help="Requests one at a time, in each round.")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in which systems take turns.")] = 3,
    peers: Annotated[bool, typer.Option("--peers", help="Measure sglang-router as well.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there as well.")] = None,
) -> None:
    """Measure what the router adds to first tokens and to each token, and how many tokens a core of it streams."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        found = asyncio.run(measure(requests, rounds, peers, console.print))
    except SegueError as error:
        console.print(f"error: {error.message}", style="red", markup=False)
        raise typer.Exit(1) from None
    report = Report({**machine_facts(), "step_ms": STEP_MS, "streams": _CROWD}, commit(), found)
    print_report(report, console)
    if json_file is not None:
        write_json(report, json_file)


if __name__ == "__main__":
    typer.run(main)
