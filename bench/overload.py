"""`python -m bench.overload`: three times more requests than workers can serve, and what becomes of them.

Requests come at random moments, whether or not earlier ones were answered (an open loop), at one, two and three times what the
workers can compute. Goodput counts the answers whose first token came in time. A router that lets everybody in serves nobody in
time; one that refuses what would come too late keeps its goodput, and tells those it refuses at once.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.fake_cluster import fake_cluster
from bench.machine import commit, machine_facts
from bench.report import Report, Row, percentile, print_report, write_json
from segue.client import AsyncClient, Output, RetryPolicy
from segue.errors import SegueError

PREFILL_WORKERS, PREFILL_MS_PER_TOKEN, PROMPT_TOKENS = 2, 0.25, 200
STEP_MS, ANSWER_TOKENS = 10.0, 16
# Two workers, a prompt of 50 ms each.
CAPACITY_RPS = PREFILL_WORKERS * 1000 / (PREFILL_MS_PER_TOKEN * PROMPT_TOKENS)
TTFT_LIMIT_S = 1.5
MAX_WAIT_S = 0.8
_CONNECTIONS = 4


@dataclass
class Outcomes:
    num_asked: int = 0
    ttft_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def num_good(self) -> int:
        return sum(ttft_s <= TTFT_LIMIT_S for ttft_s in self.ttft_s)


async def ask(client: AsyncClient, prompt: list[int], outcomes: Outcomes) -> None:
    outcomes.num_asked += 1
    begin_s, ttft_s = time.perf_counter(), None
    try:
        async with client.stream(prompt, max_tokens=ANSWER_TOKENS, ignore_eos=True, temperature=0.0) as events:
            async for event in events:
                if ttft_s is None and isinstance(event, Output):
                    ttft_s = time.perf_counter() - begin_s
    except SegueError as error:
        if error.code == "overloaded":
            outcomes.refused_s.append(time.perf_counter() - begin_s)
        outcomes.errors[error.code] += 1
    else:
        assert ttft_s is not None
        outcomes.ttft_s.append(ttft_s)


async def load(clients: list[AsyncClient], rate_rps: float, seconds: float, seed: int) -> Outcomes:
    """Waits for every answer."""
    outcomes, chance, loop = Outcomes(), Random(seed), asyncio.get_running_loop()
    due_s, end_s = loop.time(), loop.time() + seconds
    async with asyncio.TaskGroup() as group:
        while (due_s := due_s + chance.expovariate(rate_rps)) < end_s:
            if due_s > loop.time():
                await asyncio.sleep(due_s - loop.time())
            prompt = [chance.randrange(250) for _ in range(PROMPT_TOKENS)]
            group.create_task(ask(chance.choice(clients), prompt, outcomes))
    return outcomes


async def measure(seconds: float, factors: list[float], console: Console) -> list[Row]:
    router = {"max_wait_s": MAX_WAIT_S}
    workers: dict[str, Any] = {
        "prefill": PREFILL_WORKERS,
        "decode": 2,
        "prefill_ms_per_token": PREFILL_MS_PER_TOKEN,
        "step_ms": STEP_MS,
    }
    rows, goodput = list[Row](), dict[float, float]()
    async with fake_cluster(router=router, **workers) as cluster:
        clients = [AsyncClient(cluster.router.grpc, retry=RetryPolicy(max_attempts=1)) for _ in range(_CONNECTIONS)]
        for factor in factors:
            console.print(f"{factor:g} x capacity ({factor * CAPACITY_RPS:.0f} requests/s) for {seconds:g} s")
            outcomes = await load(clients, factor * CAPACITY_RPS, seconds, seed=int(10 * factor))
            goodput[factor] = outcomes.num_good / seconds
            name = f"{factor:g}x".replace(".", "_")
            rows.append(Row(f"goodput_{name}_rps", goodput[factor], "requests/s", {"capacity": goodput[factor] / CAPACITY_RPS}))
            rows.append(Row(f"ttft_{name}_p99_ms", 1000 * percentile(outcomes.ttft_s, 99), "ms"))
            if outcomes.refused_s:
                refused_ms = 1000 * percentile(outcomes.refused_s, 99)
                rows.append(Row(f"refused_{name}", len(outcomes.refused_s), "requests"))
                rows.append(Row(f"refused_{name}_p99_ms", refused_ms, "ms"))
            if others := outcomes.errors - Counter(overloaded=outcomes.errors["overloaded"]):
                console.print(f"other errors: {dict(others)}", style="red")
        for client in clients:
            await client.close()
    rows.append(Row("goodput_most_over_peak", goodput[max(factors)] / max(goodput.values()), "ratio"))
    return rows


def main(
    seconds: Annotated[float, typer.Option(min=1, help="How long requests come, at each rate.")] = 15.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there as well.")] = None,
) -> None:
    """Ask for more than workers can do, and measure what is still served in time."""
    console = Console(highlight=False, soft_wrap=True)
    rows = asyncio.run(measure(seconds, [0.5, 1.0, 2.0, 3.0], console))
    facts = {**machine_facts(), "capacity_rps": CAPACITY_RPS, "ttft_limit_s": TTFT_LIMIT_S, "max_wait_s": MAX_WAIT_S}
    report = Report(facts, commit(), rows)
    print_report(report, console)
    if json_file is not None:
        write_json(report, json_file)


if __name__ == "__main__":
    typer.run(main)
