"""`python -m bench.chaos`: processes are killed, stopped and cut off under load, and no client notices.

    answers, undisturbed → load, and a fault every moment → rest: what is left behind is counted

Two prefill workers, two decode workers and two routers, real processes. Clients ask without a pause and compare every token
with the undisturbed answer. A fault hits a random process at a random moment:

    kill    SIGKILL; the process is started again
    stop    SIGSTOP for longer than anybody waits for a hung worker, then SIGCONT: it wakes up in a world that went on
    cut     one of its TCP connections breaks: a link to a router, KV under way, the store, a client's
    corrupt bytes of KV are damaged on their way, all the time, in every worker

The time to recover from a fault is how long the last of the streams that ran at its moment waited for its next token.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from bench.aborts import Held, held_at_rest
from bench.connections import cut_connection
from bench.forked_cluster import ForkedCluster, forked_cluster
from bench.machine import commit, machine_facts
from bench.nursery import running_nursery
from bench.prompts import random_prompts
from bench.report import Report, Row, percentile, print_report, write_json
from bench.tiny_model import make_tiny_model
from deploy.valkey import embedded_valkey
from segue.client import AsyncClient, Completed, GenerateOptions, Output
from segue.errors import SegueError
from segue.paths import logs_dir
from segue.runtime import background

WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
KINDS = ("kill", "stop", "cut")
CORRUPT = 0.002
# Some wake up before anybody gave them up (2.5 s), some when their lease has lapsed (3 s).
_STOP_S = (0.5, 5.0)
_BETWEEN_FAULTS_S = 0.5
_PROMPT_TOKENS = (1, 20, 70, 150)
_NUM_TOKENS = 48


@dataclass(eq=False, slots=True)
class Stream:
    """A request that is being answered."""

    _waiters: list[asyncio.Future[None]] = field(default_factory=list)

    def went_on(self) -> None:
        """A token came, or the end."""
        for waiter in self._waiters:
            waiter.set_result(None)
        self._waiters.clear()

    def next_sign(self) -> asyncio.Future[None]:
        """Done when the stream goes on."""
        self._waiters.append(waiter := asyncio.get_running_loop().create_future())
        return waiter


@dataclass
class Outcomes:
    num_answered: int = 0
    num_wrong: int = 0
    # Attempts beyond the first.
    num_failovers: int = 0
    # By the code of the error that a client saw.
    errors: Counter[str] = field(default_factory=Counter)
    # Seconds, by kind of fault and role of the process.
    recovery_s: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    num_faults: Counter[str] = field(default_factory=Counter)


class Load:
    """Clients that ask without a pause. Answers are compared with those given before any fault."""

    def __init__(self, clients: Sequence[AsyncClient], prompts: Sequence[Sequence[int]], outcomes: Outcomes) -> None:
        self._clients = itertools.cycle(clients)
        self._options = [
            (list(prompt), GenerateOptions(max_tokens=_NUM_TOKENS, ignore_eos=True, seed=seed, temperature=seed % 2))
            for seed, prompt in enumerate(prompts)
        ]
        self._answers: list[tuple[int, ...]] = []
        self._outcomes = outcomes
        self.streams: set[Stream] = set()

    async def learn(self) -> None:
        client = next(self._clients)
        self._answers = [(await client.generate(prompt, **options)).token_ids for prompt, options in self._options]

    async def ask_on(self, number: int) -> None:
        """Until cancelled."""
        for index in itertools.count(number):
            await self._ask(index % len(self._options))

    async def _ask(self, index: int) -> None:
        prompt, options = self._options[index]
        outcomes, tokens, stream = self._outcomes, list[int](), Stream()
        self.streams.add(stream)
        try:
            async with next(self._clients).stream(prompt, **options) as events:
                async for event in events:
                    stream.went_on()
                    if isinstance(event, Output):
                        tokens += [token.token_id for token in event.tokens]
                    if isinstance(event, Completed):
                        outcomes.num_failovers += event.paths[0].attempts - 1
        except SegueError as error:
            outcomes.errors[error.code] += 1
        else:
            outcomes.num_answered += 1
            outcomes.num_wrong += tuple(tokens) != self._answers[index]
        finally:
            self.streams.discard(stream)
            stream.went_on()


class Faults:
    """Hits processes of a cluster, never the last of its role that serves."""

    def __init__(self, cluster: ForkedCluster, load: Load, outcomes: Outcomes, targets: Sequence[str], seed: int) -> None:
        self._cluster = cluster
        self._load = load
        self._outcomes = outcomes
        self._targets = targets
        self._chance = Random(seed)
        # Processes that were hit and do not serve again yet.
        self._down: set[str] = set()

    async def strike(self, num_faults: int, note: Callable[[int], None]) -> None:
        """Hits `num_faults` times, and returns when all that was hit serves again."""
        mending: set[asyncio.Task[None]] = set()
        while self._outcomes.num_faults.total() < num_faults:
            await asyncio.sleep(self._chance.random() * 2 * _BETWEEN_FAULTS_S)
            if (target := self._choose()) is not None:
                task = asyncio.create_task(self._hit(target, self._chance.choice(KINDS)))
                mending.add(task)
                note(self._outcomes.num_faults.total())
            for task in [task for task in mending if task.done()]:
                mending.discard(task)
                task.result()
        await asyncio.gather(*mending)

    def _choose(self) -> str | None:
        down_roles = {_role(name) for name in self._down}
        up = [name for name in self._targets if _role(name) not in down_roles]
        return self._chance.choice(up) if up else None

    async def _hit(self, target: str, kind: str) -> None:
        name = f"{kind}_{_role(target)}"
        self._down.add(target)
        self._outcomes.num_faults[name] += 1
        recovery = asyncio.create_task(self._watch_recovery(name))
        try:
            await getattr(self, f"_{kind}")(target)
            await recovery
        finally:
            self._down.discard(target)

    async def _watch_recovery(self, name: str) -> None:
        begin_s = time.perf_counter()
        await asyncio.gather(*(stream.next_sign() for stream in self._load.streams))
        self._outcomes.recovery_s[name].append(time.perf_counter() - begin_s)

    async def _kill(self, target: str) -> None:
        self._cluster.signal(target, signal.SIGKILL)
        await self._cluster.start(target)

    async def _stop(self, target: str) -> None:
        self._cluster.signal(target, signal.SIGSTOP)
        await asyncio.sleep(self._chance.uniform(*_STOP_S))
        self._cluster.signal(target, signal.SIGCONT)
        await self._cluster.until_serving(target)

    async def _cut(self, target: str) -> None:
        cut_connection(self._cluster.pids[target], self._chance)
        await self._cluster.until_serving(target)


def _role(name: str) -> str:
    return name.partition("-")[0]


async def measure(
    cluster: ForkedCluster,
    num_faults: int,
    *,
    at_a_time: int,
    num_routers: int,
    seed: int,
    note: Callable[[int], None] = lambda _: None,
) -> tuple[Outcomes, Held]:
    """What became of the requests, and what was held when all was over. Starts the workers, and routers after the first."""
    outcomes, routers = Outcomes(), [f"router-{number}" for number in range(num_routers)]
    for name in (*routers[1:], *WORKERS):
        await cluster.start(name)
    prompts = [prompt for size in _PROMPT_TOKENS for prompt in random_prompts(4, size, 250, seed=size)]
    async with AsyncExitStack() as stack:
        # Each has a connection of its own, to one router or another.
        clients = [await stack.enter_async_context(AsyncClient(cluster.address)) for _ in range(2 * num_routers)]
        load = Load(clients, prompts, outcomes)
        await load.learn()
        targets = (*WORKERS, *(routers if num_routers > 1 else ()))
        async with background(*(load.ask_on(number) for number in range(at_a_time))):
            await Faults(cluster, load, outcomes, targets, seed).strike(num_faults, note)
    return outcomes, await held_at_rest(cluster.client)


def rows(outcomes: Outcomes, held: Held) -> list[Row]:
    counts = {
        "chaos_faults": outcomes.num_faults.total(),
        "chaos_answered": outcomes.num_answered,
        "chaos_failovers": outcomes.num_failovers,
        "chaos_client_errors": outcomes.errors.total(),
        "chaos_wrong_answers": outcomes.num_wrong,
        "chaos_leaked_blocks": held.blocks,
        "chaos_leaked_sequences": held.sequences,
        "chaos_leaked_tickets": held.tickets,
    }
    table = [Row(metric, count, metric.rpartition("_")[2]) for metric, count in counts.items()]
    for kind, seconds in sorted(outcomes.recovery_s.items()):
        for percent in (50, 99):
            runs = [1000 * recovery_s for recovery_s in seconds]
            table.append(Row(f"recovery_ms_{kind}_p{percent}", percentile(runs, percent), "ms", {}, tuple(runs)))
    return table


def is_clean(outcomes: Outcomes, held: Held) -> bool:
    return not outcomes.errors and not outcomes.num_wrong and held == Held(0, 0, 0)


async def run(
    num_faults: int, at_a_time: int, num_routers: int, seed: int, console: Console, **worker_options: Any
) -> tuple[Outcomes, Held]:
    """Starts everything and ends it again."""
    logs = logs_dir() / f"chaos-{secrets.token_hex(4)}"
    logs.mkdir(parents=True)
    console.print(f"logs: {logs}", style="dim")
    async with AsyncExitStack() as stack:
        model_dir = make_tiny_model(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tiny")
        valkey = await stack.enter_async_context(embedded_valkey(logs / "valkey.log"))
        nursery = await stack.enter_async_context(running_nursery())
        bar = stack.enter_context(Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console))
        task = bar.add_task("faults", total=num_faults)
        options = {"chaos": f"seed={seed},corrupt={CORRUPT}", **worker_options}
        cluster = await stack.enter_async_context(forked_cluster(nursery, valkey.url, model_dir, logs, **options))

        def note(num_faults: int) -> None:
            bar.update(task, completed=num_faults)

        return await measure(cluster, num_faults, at_a_time=at_a_time, num_routers=num_routers, seed=seed, note=note)


def main(
    faults: Annotated[int, typer.Option(min=1, help="How often a process is hit.")] = 200,
    at_a_time: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 12,
    routers: Annotated[int, typer.Option(min=1, max=8, help="Routers behind one address; with one alone, it is not hit.")] = 2,
    transport: Annotated[str, typer.Option(help="How KV travels: shm or tcp.")] = "tcp",
    seed: Annotated[int, typer.Option(help="Of the order in which faults come.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there as well.")] = None,
) -> None:
    """Kill, stop and cut off processes under load and count what clients saw of it. Fails when they saw anything."""
    console = Console(highlight=False, soft_wrap=True)
    outcomes, held = asyncio.run(run(faults, at_a_time, routers, seed, console, kv_transport=transport))
    facts = {**machine_facts(), "transport": transport, "routers": routers, "at_a_time": at_a_time, "seed": seed}
    report = Report(facts, commit(), rows(outcomes, held))
    print_report(report, console)
    console.print(f"faults: {dict(sorted(outcomes.num_faults.items()))}; errors: {dict(outcomes.errors) or 'none'}")
    console.print("no client noticed" if is_clean(outcomes, held) else "NOT CLEAN", style="bold")
    if json_file is not None:
        write_json(report, json_file)
    if not is_clean(outcomes, held):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
