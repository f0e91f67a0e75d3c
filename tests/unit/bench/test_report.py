from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from bench.machine import commit, machine_facts
from bench.report import Report, Row, median_row, percentile, print_report, ratio_row, write_json

REPORT = Report(
    {"cpu": "any", "flags": ["avx2", "fma"]}, "abc", [median_row("ttft_ms", "ms", [3.0, 1.0, 2.0], {"peer": [4.0]})]
)


def test_a_row_is_the_median_of_its_runs_and_keeps_them() -> None:
    assert REPORT.rows == [Row("ttft_ms", 2.0, "ms", {"peer": 0.5}, (3.0, 1.0, 2.0))]


def test_a_ratio_compares_medians_and_keeps_the_pairs() -> None:
    assert ratio_row("r", [2.0, 3.0, 10.0], [1.0, 2.0, 4.0]) == Row("r", 1.5, "ratio", {}, (2.0, 1.5, 2.5))
    with pytest.raises(ValueError, match="longer"):
        ratio_row("r", [1.0], [1.0, 2.0])


def test_what_was_never_measured_has_no_value() -> None:
    with pytest.raises(ValueError, match="peer was never measured"):
        median_row("m", "ms", [1.0], {"peer": []})


def test_json_has_the_fixed_shape(tmp_path: Path) -> None:
    file = tmp_path / "new" / "report.json"
    write_json(REPORT, file)
    assert json.loads(file.read_text()) == {
        "machine": {"cpu": "any", "flags": ["avx2", "fma"]},
        "commit": "abc",
        "rows": [{"metric": "ttft_ms", "value": 2.0, "unit": "ms", "ratio_to": {"peer": 0.5}, "runs": [3.0, 1.0, 2.0]}],
    }


def test_the_table_shows_every_row_whole() -> None:
    name = "a_metric_with_a_name_that_is_longer_than_half_a_terminal"
    written = io.StringIO()
    console = Console(file=written, width=80, soft_wrap=True)
    print_report(Report(REPORT.machine, "abc", [*REPORT.rows, median_row(name, "tok/s", [12345.0])]), console)
    shown = written.getvalue()
    assert name in shown
    assert "12,345" in shown
    assert "peer 0.50" in shown
    assert "commit abc; cpu any, flags avx2 fma" in shown


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 100))
@settings(max_examples=50)
def test_percentiles_lie_between_the_extremes_and_agree_with_the_median(values: list[float], percent: float) -> None:
    assert min(values) - 1e-6 <= percentile(values, percent) <= max(values) + 1e-6
    assert percentile(values, 0) == min(values)
    assert percentile(values, 100) == max(values)


def test_percentiles_are_linear_between_neighbours() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([0.0, 10.0], 99) == pytest.approx(9.9)
    for values, percent in (([], 50), ([1.0], 101), ([1.0], -1)):
        with pytest.raises(ValueError, match="percentile"):
            percentile(values, percent)


def test_machine_facts_are_read_from_proc(tmp_path: Path) -> None:
    cpuinfo, meminfo = tmp_path / "cpuinfo", tmp_path / "meminfo"
    cpuinfo.write_text("model name\t: A: fast one\nflags\t\t: fpu avx2 sse avx512f\n\nmodel name\t: other\n")
    meminfo.write_text("MemTotal:       16777216 kB\n")
    facts = machine_facts(cpuinfo, meminfo)
    assert (facts["cpu"], facts["flags"], facts["memory_gib"]) == ("A: fast one", ["avx2", "avx512f"], 16.0)
    unknown = machine_facts(tmp_path / "none", tmp_path / "none")
    assert unknown["cpu"]
    assert unknown["flags"] == []


def test_no_commit_outside_a_checkout(tmp_path: Path) -> None:
    assert commit(tmp_path) == "unknown"
