"""`python -m bench.aborts`: clients that go away at random moments, by the thousand, on a cluster whose KV memory is full.

    answers, undisturbed → aborts, until so many went away → rest → a full cache: all are answered in time → rest

What is left behind is counted where it would be: blocks, sequences and tickets that workers still hold. Some clients stay to
the end; their tokens must be those of the undisturbed cluster.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID

from bench.local_cluster import LocalCluster
from bench.machine import commit, machine_facts
from bench.prompts import random_prompts
from bench.report import Report, Row, print_report, write_json
from bench.tiny_model import make_tiny_model
from engine.layout import kv_layout
from segue.client import AsyncClient, ClusterStatus, GenerateOptions, RetryPolicy
from segue.config import EngineSettings, KVTransport
from segue.errors import SegueError
from segue.models.config import ModelConfig
from segue.models.store import resolve
from segue.runtime import background
from segue.worker_link import LOAD_INTERVAL_S

# No request takes longer, whatever happens: the router ends it then.
REQUEST_LIMIT_S = 60.0
# What an ended request held is free again within a ticket's lease, 10 s, and the worker's next report.
REST_LIMIT_S = 15.0
# A worker's KV memory: a fraction of what the clients want at a time.
NUM_BLOCKS = 48
_PROMPT_TOKENS = (1, 20, 70, 150, 300)
_OPTIONS = GenerateOptions(max_tokens=32, temperature=0.0, ignore_eos=True)


@dataclass(slots=True)
class Outcomes:
    """What became of requests."""

    num_left: int = 0
    num_answered: int = 0
    num_wrong: int = 0
    # By the code of the error.
    errors: Counter[str] = field(default_factory=Counter)
    # Of those that were not left.
    slowest_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Held:
    """What all workers of a cluster hold. `blocks` counts those that are leased and those that are nowhere."""

    blocks: int
    sequences: int
    tickets: int

    @classmethod
    def by(cls, status: ClusterStatus) -> Held:
        loads = [worker.load for worker in status.workers]
        return cls(
            sum(load.total_blocks - load.free_blocks - load.cached_blocks for load in loads),
            sum(load.waiting_requests + load.running_requests for load in loads) + status.active_requests,
            sum(load.open_tickets for load in loads),
        )


class Crowd:
    """Clients of one cluster. The prompts' right answers are those that it gives one at a time, before the crowd comes."""

    def __init__(self, client: AsyncClient, prompts: Sequence[Sequence[int]], seed: int = 0) -> None:
        self._client = client
        self._prompts = [list(prompt) for prompt in prompts]
        self._chance = random.Random(seed)
        self._answers: list[tuple[int, ...]] = []
        # How long a request takes nowadays.
        self._usual_s = 0.0

    async def learn(self) -> None:
        begin_s = time.perf_counter()
        self._answers = [(await self._client.generate(prompt, **_OPTIONS)).token_ids for prompt in self._prompts]
        self._usual_s = (time.perf_counter() - begin_s) / len(self._prompts)

    async def leave(self, num_aborts: int, at_a_time: int, note: Callable[[int], None] = lambda _: None) -> Outcomes:
        """Sends requests until so many clients went away; `note` is told how many did. One in four stays."""
        outcomes = Outcomes()

        async def come_and_go() -> None:
            while outcomes.num_left < num_aborts:
                patience_s = self._chance.uniform(0.0, 1.5 * self._usual_s)
                await self._ask(outcomes, self._chance.choice((None, patience_s, patience_s, patience_s)))
                note(outcomes.num_left)

        await asyncio.gather(*(come_and_go() for _ in range(at_a_time)))
        return outcomes

    async def fill(self, num_requests: int) -> Outcomes:
        """So many at once, and all stay."""
        outcomes = Outcomes()
        await asyncio.gather(*(self._ask(outcomes, None) for _ in range(num_requests)))
        return outcomes

    async def _ask(self, outcomes: Outcomes, patience_s: float | None) -> None:
        index = self._chance.randrange(len(self._prompts))
        begin_s = time.perf_counter()
        try:
            async with asyncio.timeout(patience_s):
                answer = await self._client.generate(self._prompts[index], **_OPTIONS)
        except TimeoutError:
            outcomes.num_left += 1
            return
        except SegueError as error:
            outcomes.errors[error.code] += 1
        else:
            outcomes.num_answered += 1
            outcomes.num_wrong += answer.token_ids != self._answers[index]
        seconds = time.perf_counter() - begin_s
        outcomes.slowest_s = max(outcomes.slowest_s, seconds)
        self._usual_s += 0.02 * (seconds - self._usual_s)


async def held_at_rest(client: AsyncClient, limit_s: float = REST_LIMIT_S) -> Held:
    """Waits until nothing is held, for `limit_s` at most, and gives what is held then."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + limit_s
    while True:
        # What a worker said last may be from before the end.
        await asyncio.sleep(2 * LOAD_INTERVAL_S)
        held = Held.by(await client.status())
        if held == Held(0, 0, 0) or loop.time() > deadline_s:
            return held


async def occupancy(client: AsyncClient, peaks: dict[str, float]) -> None:
    """Notes, until it is cancelled, the largest share of its blocks that each worker had leased."""
    while True:
        for worker in (await client.status()).workers:
            share = worker.load.leased_blocks / max(worker.load.total_blocks, 1)
            peaks[worker.worker_id] = max(peaks.get(worker.worker_id, 0.0), share)
        await asyncio.sleep(LOAD_INTERVAL_S / 2)


@dataclass(frozen=True, slots=True)
class Result:
    """One transport's. `held` is what was left after the aborts and after the full cache, whichever was more."""

    transport: str
    aborts: Outcomes
    full: Outcomes
    held: Held
    # The decode worker's that was filled least, 0 to 1.
    occupancy: float

    @property
    def is_clean(self) -> bool:
        whole = not (self.aborts.num_wrong or self.full.num_wrong or self.aborts.errors or self.full.errors)
        return whole and self.held == Held(0, 0, 0) and max(self.aborts.slowest_s, self.full.slowest_s) <= REQUEST_LIMIT_S


async def measure(model: str, transport: KVTransport, num_aborts: int, at_a_time: int, note: Callable[[int], None]) -> Result:
    """Starts a cluster of two workers of each role, and ends it again."""
    layout = kv_layout(ModelConfig.from_dir(Path(model)), EngineSettings(), "")
    cluster = LocalCluster(
        model,
        prefill=2,
        decode=2,
        kv_transport=transport,
        kv_memory=NUM_BLOCKS * layout.block_bytes,
        router_settings={"request_timeout_s": REQUEST_LIMIT_S},
    )
    async with cluster, AsyncClient(cluster.grpc_address, retry=RetryPolicy(max_attempts=1)) as client:
        vocab_size = (await client.models())[0].vocab_size
        prompts = [prompt for size in _PROMPT_TOKENS for prompt in random_prompts(4, size, vocab_size, seed=size)]
        crowd = Crowd(client, prompts)
        await crowd.learn()
        aborts = await crowd.leave(num_aborts, at_a_time, note)
        held = await held_at_rest(client)
        peaks: dict[str, float] = {}
        async with background(occupancy(client, peaks)):
            full = await crowd.fill(8 * at_a_time)
        after = await held_at_rest(client)
    most = Held(max(held.blocks, after.blocks), max(held.sequences, after.sequences), max(held.tickets, after.tickets))
    return Result(transport, aborts, full, most, min(share for name, share in peaks.items() if name.startswith("decode")))


def rows(results: Sequence[Result]) -> list[Row]:
    """The worst of all transports; each transport is one of the runs."""

    def worst(metric: str, unit: str, values: Sequence[float], *, least: bool = False) -> Row:
        return Row(metric, min(values) if least else max(values), unit, {}, tuple(values))

    return [
        worst("aborts", "requests", [result.aborts.num_left for result in results], least=True),
        worst("aborts_leaked_blocks", "blocks", [result.held.blocks for result in results]),
        worst("aborts_leaked_sequences", "sequences", [result.held.sequences for result in results]),
        worst("aborts_leaked_tickets", "tickets", [result.held.tickets for result in results]),
        worst("aborts_answered", "requests", [result.aborts.num_answered for result in results], least=True),
        worst("aborts_wrong_answers", "requests", [result.aborts.num_wrong for result in results]),
        worst("aborts_errors", "requests", [result.aborts.errors.total() for result in results]),
        worst("aborts_slowest_s", "s", [result.aborts.slowest_s for result in results]),
        worst("full_cache_occupancy", "share", [result.occupancy for result in results], least=True),
        worst("full_cache_answered", "requests", [result.full.num_answered for result in results], least=True),
        worst("full_cache_wrong_answers", "requests", [result.full.num_wrong for result in results]),
        worst("full_cache_errors", "requests", [result.full.errors.total() for result in results]),
        worst("full_cache_slowest_s", "s", [result.full.slowest_s for result in results]),
    ]


def run(model: str, transports: Sequence[KVTransport], num_aborts: int, at_a_time: int, console: Console) -> list[Result]:
    results = []
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        for transport in transports:
            task = progress.add_task(f"aborts over {transport}", total=num_aborts)

            def note(num_left: int, task: TaskID = task) -> None:
                progress.update(task, completed=num_left)

            results.append(asyncio.run(measure(model, transport, num_aborts, at_a_time, note)))
    return results


def main(
    aborts: Annotated[int, typer.Option(min=1, help="Clients that go away, over each transport.")] = 10_000,
    at_a_time: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 32,
    transport: Annotated[list[str] | None, typer.Option(help="shm or tcp; both if not given.")] = None,
    model: Annotated[str, typer.Option(help="What `segue up --model` takes; a tiny random model if not given.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there as well.")] = None,
) -> None:
    """Let clients go away at random moments and count what is left behind. Fails when anything is."""
    console = Console(highlight=False, soft_wrap=True)
    transports: list[KVTransport] = transport or ["shm", "tcp"]  # type: ignore[assignment]  # the cluster's settings check it
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = resolve(model).path if model else make_tiny_model(Path(folder) / "tiny")
            results = run(str(path), transports, aborts, at_a_time, console)
    except SegueError as error:
        console.print(f"error: {error.message}", style="red", markup=False)
        raise typer.Exit(1) from None
    facts = {**machine_facts(), "model": model or "tiny", "transports": list(transports), "at_a_time": at_a_time}
    report = Report(facts, commit(), rows(results))
    print_report(report, console)
    for result in results:
        word = "nothing was left behind and all were answered in time" if result.is_clean else "NOT CLEAN"
        console.print(
            f"{result.transport}: {word}; errors: {dict(result.aborts.errors + result.full.errors) or 'none'}", style="bold"
        )
    if json_file is not None:
        write_json(report, json_file)
    if not all(result.is_clean for result in results):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
