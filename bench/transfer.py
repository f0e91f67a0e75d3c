"""How fast KV travels between two processes, beside what the machine can do at most: one copy, and one plain TCP socket.

A transfer of each size goes the real way (bench/transfer_pair.py), the same bytes through the others in turns with it: ours,
theirs, ours, ... With --peers through NIXL too, which `python -m bench.peers setup` installs. GB/s and milliseconds are those
of one transfer alone, from its first byte until the writer knows that all arrived. A cluster then shows how much of a prompt's
transfer computation hides (bench/transfer_hidden.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
import uvloop
from rich.console import Console

from bench.asked import AskedProcess
from bench.machine import commit, machine_facts
from bench.peers.catalog import find_nixl
from bench.report import Report, Row, median_row, print_report, write_json
from bench.transfer_cases import REGION_BYTES, SIZES, Case
from bench.transfer_hidden import measure_hidden, met
from bench.transfer_hidden import verdicts as hidden_verdicts
from bench.transfer_pair import TransferPair
from segue.config import DEFAULT_MODEL
from segue.errors import ConfigError, SegueError

TRANSPORTS = ("shm", "tcp")
# The pieces that NIXL is measured with; its better figure counts.
NIXL_PIECES = (REGION_BYTES, 2**20)
# What UCX may use: all it has, or TCP alone.
NIXL_ENVIRONMENTS: Mapping[str, Mapping[str, str]] = {"nixl": {}, "nixl_tcp": {"UCX_TLS": "tcp"}}
# (ours, theirs, at least how many times as fast), judged at the largest size.
TARGETS = (("shm", "memcpy", 0.8), ("shm", "nixl", 1.3), ("tcp", "raw_tcp", 0.85), ("tcp", "nixl_tcp", 2.0))
JUDGED_SIZE = "64MiB"
# A run is the best of so many tries: what others do on the machine at that moment only slows down.
TRIES = 5

Measure = Callable[[], Awaitable[float]]
# System → seconds of each run.
Runs = dict[str, list[float]]


async def measure(systems: Mapping[str, Measure], repeats: int) -> Runs:
    """Takes turns: one try of each system, then the next."""
    runs: Runs = {name: [] for name in systems}
    for _ in range(repeats):
        best = dict.fromkeys(systems, float("inf"))
        for _ in range(TRIES):
            for name, measure_s in systems.items():
                best[name] = min(best[name], await measure_s())
        for name, seconds in best.items():
            runs[name].append(seconds)
    return runs


def systems_of(pair: TransferPair, case: Case, nixl: Mapping[str, AskedProcess]) -> dict[str, Measure]:
    systems: dict[str, Measure] = {"memcpy": pair.memcpy_s, "checksum": pair.checksum_s, "raw_tcp": pair.raw_tcp_s}
    systems |= {transport: partial(pair.transfer_s, transport) for transport in TRANSPORTS}
    for name, process in nixl.items():
        for piece_bytes in NIXL_PIECES:
            if piece_bytes <= case.num_bytes:
                systems[f"{name}/{piece_bytes}"] = partial(_nixl_s, process, case.num_bytes, piece_bytes)
    return systems


async def _nixl_s(process: AskedProcess, num_bytes: int, piece_bytes: int) -> float:
    return float((await process.ask({"bytes": num_bytes, "piece_bytes": piece_bytes}))["seconds"])


def rows(size: str, num_bytes: int, runs: Runs) -> list[Row]:
    """GB/s of each system with its ratios, and the milliseconds that one transfer takes alone."""
    rates = {name: [num_bytes / seconds / 1e9 for seconds in own] for name, own in _best_pieces(runs).items()}
    found = []
    for name, own in rates.items():
        others = {base: rates[base] for ours, base, _ in TARGETS if ours == name and base in rates}
        others |= {"memcpy": rates["memcpy"]} if name == "checksum" else {}
        found.append(median_row(f"{name}_{size}_gb_s", "GB/s", own, others))
    alone_ms = {transport: [seconds * 1e3 for seconds in runs[transport]] for transport in TRANSPORTS}
    return found + [median_row(f"{transport}_{size}_ms", "ms", own) for transport, own in alone_ms.items()]


def _best_pieces(runs: Runs) -> Runs:
    """Of runs named system/pieces, those of the system's fastest pieces; the others as they are."""
    best: Runs = {}
    for name, own in runs.items():
        system = name.partition("/")[0]
        if system not in best or min(own) < min(best[system]):
            best[system] = own
    return best


def verdicts(found: Sequence[Row]) -> list[str]:
    by_name = {row.metric: row for row in found}
    lines = []
    for ours, theirs, target in TARGETS:
        ratio = by_name[f"{ours}_{JUDGED_SIZE}_gb_s"].ratio_to.get(theirs)
        if ratio is not None:
            lines.append(
                f"{ours} over {theirs} at {JUDGED_SIZE}: {ratio:.2f}; target at least {target:.2f}: {met(ratio >= target)}"
            )
    return lines + (hidden_verdicts(by_name) if "handover_extra_ms" in by_name else [])


async def run(repeats: int, with_peers: bool, model: str | None, console: Console) -> Report:
    found: list[Row] = []
    with console.status("starting") as state:
        async with AsyncExitStack() as stack:
            nixl: dict[str, AskedProcess] = {}
            if with_peers:
                command = find_nixl()
                if command is None:
                    raise ConfigError("NIXL is not installed; run `python -m bench.peers setup`", field="peers")
                for name, env in NIXL_ENVIRONMENTS.items():
                    # NIXL's threads look for work all the time.
                    nixl[name] = await stack.enter_async_context(AskedProcess(name, command, env, rests=True))
                    await _nixl_s(nixl[name], REGION_BYTES, REGION_BYTES)
            for size, case in SIZES.items():
                state.update(f"moving {size}")
                async with TransferPair(case) as pair:
                    found += rows(size, case.num_bytes, await measure(systems_of(pair, case, nixl), repeats))
        if model is not None:
            found += await measure_hidden(model, state.update)
    return Report(machine_facts(), commit(), found)


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each system, each the best of 5 tries.")] = 5,
    peers: Annotated[bool, typer.Option("--peers", help="Measure NIXL as well.")] = False,
    hidden: Annotated[bool, typer.Option(help="Measure on a cluster how much of a transfer computation hides.")] = True,
    model: Annotated[str, typer.Option(help="The cluster's model, as `segue up --model` takes it.")] = DEFAULT_MODEL,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there as well.")] = None,
) -> None:
    """Measure KV transfers between two processes of this machine."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        report = uvloop.run(run(repeats, peers, model if hidden else None, console))
    except SegueError as error:
        console.print(f"error: {error.message}", style="red", markup=False)
        raise typer.Exit(1) from None
    print_report(report, console)
    for line in verdicts(report.rows):
        console.print(line, style="bold")
    if json_file is not None:
        write_json(report, json_file)


if __name__ == "__main__":
    typer.run(main)
