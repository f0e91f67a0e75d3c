"""`python -m bench.peers setup` and `python -m bench.peers measure`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.console import Console

from bench.machine import commit, machine_facts
from bench.peers.catalog import PeerSpec, find_peers, peers_dir
from bench.peers.client import Clock, Peer, PeerCannot
from bench.peers.setup import set_up
from bench.report import Report, Row, median_row, print_report, write_json
from segue.errors import ConfigError, SegueError

PROMPT_LENGTHS = (128, 1024, 4000)
BATCH_SIZES = (1, 4, 16, 64)
CONTEXT_LENGTHS = (64, 256, 1024)

app = typer.Typer(add_completion=False, help=__doc__)
console = Console(highlight=False, soft_wrap=True)


@app.command()
def setup() -> None:
    """Install the peers and write their models into SEGUE_PEERS. Takes half an hour and 4 GB; once."""
    try:
        set_up(peers_dir(), console.print)
    except SegueError as error:
        _fail(error)
    console.print(f"ready in {peers_dir()}: {', '.join(spec.name for spec in find_peers())}")


@app.command()
def measure(
    core: Annotated[int, typer.Option(min=0, help="The core that all are pinned to.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="How often the whole table is measured.")] = 3,
    clock: Annotated[str, typer.Option(help="wall or cpu: the seconds that pass, or those that a peer computes.")] = "wall",
    only: Annotated[str, typer.Option(help="Names of peers, with commas; all if empty.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there as well.")] = None,
) -> None:
    """Measure the peers alone, taking turns."""
    try:
        report = run(_chosen(only), core, _clock(clock), repeats)
    except SegueError as error:
        _fail(error)
    print_report(report, console)
    if json_file is not None:
        write_json(report, json_file)


def run(specs: list[PeerSpec], core: int, clock: Clock, repeats: int) -> Report:
    with ExitStack() as stack:
        peers = []
        for spec in specs:
            console.print(f"loading {spec.name}")
            peers.append(stack.enter_context(Peer(spec, core, clock=clock)))
        rates: dict[str, list[float]] = {}
        for number in range(repeats):
            console.print(f"run {number + 1} of {repeats}")
            measure_all(peers, rates)
        facts = {**machine_facts(), "clock": clock, **{peer.name: ", ".join(peer.facts.values()) for peer in peers}}
    rows: list[Row] = [median_row(metric, "tok/s", runs) for metric, runs in sorted(rates.items())]
    return Report(facts, commit(), rows)


def measure_all(peers: list[Peer], rates: dict[str, list[float]]) -> None:
    """Adds a rate, in tokens per second, to each metric that a peer can do."""
    for length in PROMPT_LENGTHS:
        for peer in peers:
            rate = length / peer.prefill_s(length)
            _add(rates, f"{peer.name}_prefill_{length}", rate)
    for batch in BATCH_SIZES:
        for context in CONTEXT_LENGTHS:
            for peer in peers:
                try:
                    rate = batch / peer.decode_step_s(batch, context)
                except PeerCannot as error:
                    console.print(str(error), style="dim", markup=False)
                    continue
                _add(rates, f"{peer.name}_decode_b{batch}_ctx{context}", rate)


def _add(rates: dict[str, list[float]], metric: str, rate: float) -> None:
    rates.setdefault(metric, []).append(rate)
    console.print(f"{metric}: {rate:.1f} tok/s", style="dim")


def _chosen(only: str) -> list[PeerSpec]:
    found = {spec.name: spec for spec in find_peers()}
    names = only.split(",") if only else list(found)
    if not names or (unknown := [name for name in names if name not in found]):
        missing = ", ".join(unknown) if names else "any peer"
        raise ConfigError(f"cannot find {missing} in {peers_dir()}; run `python -m bench.peers setup`", field="only")
    return [found[name] for name in names]


def _clock(name: str) -> Clock:
    if name not in get_args(Clock):
        raise ConfigError(f"clock is {' or '.join(get_args(Clock))}, not {name!r}", field="clock")
    return cast(Clock, name)


def _fail(error: SegueError) -> None:
    console.print(f"error: {error.message}", style="red", markup=False)
    raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
