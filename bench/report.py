"""The one format that every benchmark speaks: a table for people, and JSON for what compares runs.

    {"machine": {...}, "commit": "...", "rows": [{"metric": ..., "value": ..., "unit": ..., "ratio_to": {...}, "runs": [...]}]}

A value is the median of its runs, which are kept. What is compared is measured in the same process run, interleaved
(A B A B ...), so that a machine that slows down slows both.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """One metric. `ratio_to` says how many times as large as another system's value this one is."""

    metric: str
    value: float
    unit: str
    ratio_to: Mapping[str, float] = field(default_factory=dict)
    runs: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Report:
    machine: Mapping[str, Any]
    commit: str
    rows: Sequence[Row]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def median_row(metric: str, unit: str, runs: Sequence[float], others: Mapping[str, Sequence[float]] | None = None) -> Row:
    """The median of `runs` and its ratio to the median of each other system's runs. Raises ValueError for no runs."""
    value = _median(metric, runs)
    ratio_to = {name: value / _median(name, other) for name, other in (others or {}).items()}
    return Row(metric, value, unit, ratio_to, tuple(runs))


def ratio_row(metric: str, runs: Sequence[float], base_runs: Sequence[float]) -> Row:
    """The ratio of two medians; its runs are the ratios of the pairs that were measured next to each other.

    Raises ValueError when there are not equally many of both.
    """
    pairs = [run / base for run, base in zip(runs, base_runs, strict=True)]
    return Row(metric, _median(metric, runs) / _median(metric, base_runs), "ratio", {}, tuple(pairs))


def _median(name: str, runs: Sequence[float]) -> float:
    if not runs:
        raise ValueError(f"{name} was never measured")
    return statistics.median(runs)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest values, as numpy does it. Raises ValueError for no values or a percent off 0 to 100."""
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"no {percent}th percentile of {len(values)} values")
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def write_json(report: Report, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(report.to_json())


def print_report(report: Report, console: Console | None = None) -> None:
    """The table, with the spread of the runs, and one line on the machine."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    # A name cut short is no name.
    table.add_column("metric", min_width=max((len(row.metric) for row in report.rows), default=0))
    for name in ("value", "unit", "runs", "min", "max"):
        table.add_column(name, justify="left" if name == "unit" else "right")
    table.add_column("ratio to")
    for row in report.rows:
        spread = [_number(bound(row.runs)) for bound in (min, max)] if row.runs else ["", ""]
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row.ratio_to.items())
        table.add_row(row.metric, _number(row.value), row.unit, str(len(row.runs)), *spread, ratios)
    facts = ", ".join(f"{name} {_fact(value)}" for name, value in report.machine.items())
    shown = console or Console(highlight=False, soft_wrap=True)
    shown.print(table)
    shown.print(f"commit {report.commit}; {facts}", style="dim", markup=False)


def _number(value: float) -> str:
    """Three significant digits, without an exponent where people would not write one."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _fact(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
