"""`python -m bench.overload`: three times more requests than workers can serve, and what becomes of them.

Requests come at random moments, whether or not earlier ones were answered (an open loop), at one, two and three times what the
workers can compute. Goodput counts the answers whose first token came in time. A router that lets everybody in serves nobody in
time; one that refuses what would come too late keeps its goodput, and tells those it refuses at once. At last a tenant that
asks for little is served beside the one that asks for too much.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from rich.console import Console

from bench.fake_cluster import fake_cluster
from bench.machine import commit, machine_facts
from bench.report import Report, Row, percentile, print_report, write_json
from segue.api_keys import create_key
from segue.client import Access, AsyncClient, Output, RetryPolicy
from segue.errors import SegueError

PREFILL_WORKERS, PREFILL_MS_PER_TOKEN, PROMPT_TOKENS = 2, 0.25, 200
STEP_MS, ANSWER_TOKENS = 10.0, 16
# Two workers, a prompt of 50 ms each.
CAPACITY_RPS = PREFILL_WORKERS * 1000 / (PREFILL_MS_PER_TOKEN * PROMPT_TOKENS)
TTFT_LIMIT_S = 1.5
MAX_WAIT_S = 0.8
LIGHT_RPS = 2.0
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
    workers: dict[str, Any] = {
        "prefill": PREFILL_WORKERS,
        "decode": 2,
        "prefill_ms_per_token": PREFILL_MS_PER_TOKEN,
        "step_ms": STEP_MS,
    }
    async with AsyncExitStack() as stack:
        keys_file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "keys.json"
        keys = {name: create_key(keys_file, name) for name in ("heavy", "light")}
        router = {"max_wait_s": MAX_WAIT_S, "api_keys_file": keys_file}
        cluster = await stack.enter_async_context(fake_cluster(router=router, api_key=keys["heavy"], **workers))

        async def connect(name: str) -> AsyncClient:
            client = AsyncClient(cluster.router.grpc, access=Access(api_key=keys[name]), retry=RetryPolicy(max_attempts=1))
            return await stack.enter_async_context(client)

        heavy = [await connect("heavy") for _ in range(_CONNECTIONS)]
        light = [await connect("light")]
        rows, goodput = list[Row](), dict[float, float]()
        for factor in factors:
            console.print(f"{factor:g} x capacity ({factor * CAPACITY_RPS:.0f} requests/s) for {seconds:g} s")
            outcomes = await load(heavy, factor * CAPACITY_RPS, seconds, seed=int(10 * factor))
            goodput[factor] = outcomes.num_good / seconds
            rows += rows_of(f"{factor:g}x".replace(".", "_"), outcomes, goodput[factor])
            if others := outcomes.errors - Counter(overloaded=outcomes.errors["overloaded"]):
                console.print(f"other errors: {dict(others)}", style="red")
        rows.append(Row("goodput_most_over_peak", goodput[max(factors)] / max(goodput.values()), "ratio"))
        console.print(f"a light tenant, alone and beside a heavy one, for {seconds:g} s each")
        alone = await load(light, LIGHT_RPS, seconds, seed=1)
        _, beside = await asyncio.gather(
            load(heavy, max(factors) * CAPACITY_RPS, seconds, seed=2), load(light, LIGHT_RPS, seconds, seed=1)
        )
    return rows + rows_of_light(alone, beside)


def rows_of(name: str, outcomes: Outcomes, goodput_rps: float) -> list[Row]:
    rows = [
        Row(f"goodput_{name}_rps", goodput_rps, "requests/s", {"capacity": goodput_rps / CAPACITY_RPS}),
        Row(f"ttft_{name}_p99_ms", 1000 * percentile(outcomes.ttft_s, 99), "ms"),
    ]
    if outcomes.refused_s:
        rows.append(Row(f"refused_{name}", len(outcomes.refused_s), "requests"))
        rows += [
            Row(f"refused_{name}_p{percent}_ms", 1000 * percentile(outcomes.refused_s, percent), "ms") for percent in (50, 99)
        ]
    return rows


def rows_of_light(alone: Outcomes, beside: Outcomes) -> list[Row]:
    rows = [Row("light_refused_beside_heavy", sum(beside.errors.values()), "requests")]
    for percent in (50, 99):
        alone_ms, beside_ms = (1000 * percentile(outcomes.ttft_s, percent) for outcomes in (alone, beside))
        rows.append(Row(f"light_ttft_beside_heavy_p{percent}_ms", beside_ms, "ms", {"alone": beside_ms / alone_ms}))
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
