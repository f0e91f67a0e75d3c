"""The quality benchmark: its figures follow from what it measured, and it runs from the text to the report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import perplexity
from bench.perplexity import BASE, QUANTIZATIONS, Measured, evaluation_text, rows, run, share_before_parting
from engine.scoring import Score
from segue.models.store import import_model
from tests.support.gguf_files import TinyGguf


def measured(log_likelihood: float, likeliest: list[int], answer: list[int]) -> Measured:
    return Measured(Score(torch.full((4,), log_likelihood), torch.tensor(likeliest)), [answer])


def test_figures_compare_each_format_with_float32() -> None:
    table = rows({BASE: measured(-1.0, [1, 2, 3, 4], [7, 7, 7, 7]), "int8": measured(-1.5, [1, 2, 3, 5], [7, 8, 7, 7])})
    values = {row.metric: row.value for row in table}
    assert values == {
        "perplexity_float32": pytest.approx(2.71828, rel=1e-5),
        "perplexity_int8": pytest.approx(4.48169, rel=1e-5),
        "perplexity_int8_over_float32": pytest.approx(1.64872, rel=1e-5),
        "perplexity_int8_excess": pytest.approx(64.872, rel=1e-4),
        "same_likeliest_int8": 0.75,
        "same_greedy_int8": 0.25,
    }


def test_answers_count_until_they_part() -> None:
    assert share_before_parting([[1, 2, 3, 4]], [[1, 2, 3, 4]]) == 1.0
    assert share_before_parting([[1, 2, 3, 4], [1, 2, 3, 4]], [[1, 2, 9, 4], [9, 2, 3, 4]]) == 0.25


def test_the_text_is_not_the_one_that_calibration_sees() -> None:
    seen = (Path(__file__).parents[3] / "engine" / "texts" / "calibration.txt").read_text(encoding="utf-8").splitlines()
    shared = {line for line in evaluation_text().splitlines() if len(line) > 40} & set(seen)
    assert not shared


def test_from_a_model_to_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(perplexity, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(perplexity, "QUESTIONS", perplexity.QUESTIONS[:2])
    handle = import_model(TinyGguf("llama").write(tmp_path / "tiny.gguf"), "tiny")
    report = run(handle.name, flags={"threads": 1}, kernels="torch", console=Console(quiet=True))
    values = {row.metric: row.value for row in report.rows}
    assert report.machine["tokens"] == 256
    for name in QUANTIZATIONS.keys() - {BASE}:
        assert values[f"perplexity_{name}_over_{BASE}"] == pytest.approx(
            values[f"perplexity_{name}"] / values["perplexity_float32"]
        )
    # A random network of wide weights feels every rounding; still it is the same network.
    assert 0 < abs(values["perplexity_int8_excess"]) < 10
    assert 0 < abs(values["perplexity_int4_excess"]) < 80
    assert 0.2 < values["same_likeliest_int4"] < values["same_likeliest_int8"] < 1
