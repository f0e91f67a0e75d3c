"""`python -m bench.conversations`: what a conversation's later turns cost when decode gives back the KV of its answers.

Three clusters are up at the same time, at equal threads for each worker, and take turns with the same conversations: split,
split without fetching KV from decode (`--no-kv-pull`), and colocated, where one worker has everything. Each turn's prompt is
all that was said before and something new.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.local_cluster import LocalCluster
from bench.machine import commit, machine_facts
from bench.overhead import Stopwatch
from bench.prompts import random_prompts
from bench.report import Report, Row, median_row, print_report, write_json
from segue.client import AsyncClient
from segue.config import DEFAULT_MODEL
from segue.errors import SegueError

SYSTEMS = ("pulling", "recomputing", "colocated")


@dataclass(frozen=True, slots=True)
class Turn:
    num_prompt_tokens: int
    # What prefill computed itself.
    num_computed_tokens: int
    ttft_s: float


async def converse(client: AsyncClient, parts: Sequence[Sequence[int]], num_answer_tokens: int) -> list[Turn]:
    """One conversation; `parts` are what its user says, turn by turn."""
    said: list[int] = []
    turns = []
    for part in parts:
        said += part
        watch = Stopwatch()
        answer: list[int] = []
        async for event in client.stream(said, max_tokens=num_answer_tokens, temperature=0, ignore_eos=True):
            watch.see(event)
            answer += [token.token_id for token in getattr(event, "tokens", ())]
        timing = watch.timing()
        known = timing.path.prefill_cached_tokens + timing.path.prefill_pulled_tokens
        turns.append(Turn(len(said), len(said) - known, timing.ttft_s))
        said += answer
    return turns


def rows(conversations: dict[str, list[list[Turn]]]) -> list[Row]:
    """`conversations` [system][conversation][turn]"""
    found = []
    for index, turn in enumerate(conversations["pulling"][0]):
        computed, ttft_ms = (
            {name: [measure(turns[index]) for turns in conversations[name]] for name in SYSTEMS}
            for measure in (lambda turn: float(turn.num_computed_tokens), lambda turn: turn.ttft_s * 1e3)
        )
        name = f"turn{index + 1}_{turn.num_prompt_tokens}"
        for what, unit, values in (("prefilled", "tokens", computed), ("ttft", "ms", ttft_ms)):
            others = {other: values[other] for other in SYSTEMS[1:]}
            found.append(median_row(f"{name}_{what}", unit, values["pulling"], others))
    return found


async def run(
    model: str, *, num_conversations: int, num_turns: int, user_tokens: int, answer_tokens: int, console: Console
) -> Report:
    with console.status("starting three clusters") as state:
        clusters = [
            LocalCluster(model, threads=1),
            LocalCluster(model, threads=1, worker_settings={"kv_pull": False}),
            LocalCluster(model, threads=1, colocated=True),
        ]
        async with AsyncExitStack() as stack:
            for cluster in clusters:
                await stack.enter_async_context(cluster)
            clients = [await stack.enter_async_context(AsyncClient(cluster.grpc_address)) for cluster in clusters]
            vocab_size = (await clients[0].models())[0].vocab_size
            parts = random_prompts((num_conversations + 1) * num_turns, user_tokens, vocab_size)
            results = await _measure(clients, parts, num_turns, answer_tokens, state.update)
    facts = {**machine_facts(), "model": Path(model).name, "threads_per_worker": 1, "answer_tokens": answer_tokens}
    return Report(facts, commit(), rows(results))


async def _measure(
    clients: Sequence[AsyncClient],
    parts: Sequence[Sequence[int]],
    num_turns: int,
    answer_tokens: int,
    note: Callable[[str], None],
) -> dict[str, list[list[Turn]]]:
    """The first conversation only warms up."""
    results: dict[str, list[list[Turn]]] = {name: [] for name in SYSTEMS}
    for start in range(0, len(parts), num_turns):
        for name, client in zip(SYSTEMS, clients, strict=True):
            turns = await converse(client, parts[start : start + num_turns], answer_tokens)
            if start:
                results[name].append(turns)
        note(f"conversation {start // num_turns} with each system" if start else "warmed up")
    return results


def main(
    conversations: Annotated[int, typer.Option(min=1, help="Conversations with each system.")] = 5,
    turns: Annotated[int, typer.Option(min=2, help="Turns of each conversation.")] = 5,
    user_tokens: Annotated[int, typer.Option(min=1, help="What the user says in a turn.")] = 64,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 128,
    model: Annotated[str, typer.Option(help="What `segue up --model` takes.")] = DEFAULT_MODEL,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there as well.")] = None,
) -> None:
    """Measure the later turns of conversations: with the answers' KV fetched from decode, computed anew, and colocated."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        report = asyncio.run(
            run(
                model,
                num_conversations=conversations,
                num_turns=turns,
                user_tokens=user_tokens,
                answer_tokens=answer_tokens,
                console=console,
            )
        )
    except SegueError as error:
        console.print(f"error: {error.message}", style="red", markup=False)
        raise typer.Exit(1) from None
    print_report(report, console)
    if json_file is not None:
        write_json(report, json_file)


if __name__ == "__main__":
    typer.run(main)
