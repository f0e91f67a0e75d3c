"""`segue models`, as a person uses it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli.models import app
from segue.config import DEFAULT_MODEL
from segue.models import store
from segue.models.model_dir import calibration_file
from tests.support.gguf_files import TinyGguf


@pytest.fixture(autouse=True)
def segue_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEGUE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_import_then_list(tmp_path: Path) -> None:
    file = TinyGguf("llama").write(tmp_path / "tiny.gguf")
    code, output, progress = run("import", str(file), "--name", "mine")
    assert (code, output) == (0, "stored as mine: segue up --model mine\n")
    assert "importing tiny.gguf" in progress
    code, output, _ = run("list")
    assert code == 0
    assert output.split()[0] == "mine"
    assert output.split()[-1] == str(tmp_path / "home" / "models" / "mine")


def test_an_empty_store_says_how_to_fill_it() -> None:
    code, output, hint = run("list")
    assert (code, output) == (0, "")
    assert "run segue models pull" in hint


def test_list_names_what_is_damaged(tmp_path: Path, segue_home: Path) -> None:
    run("import", str(TinyGguf("llama").write(tmp_path / "tiny.gguf")), "--name", "mine")
    (segue_home / "models" / "mine" / "tokenizer.json").unlink()
    code, output, errors = run("list")
    assert (code, output) == (0, "")
    assert "damaged: cannot read" in errors
    assert "tokenizer.json" in errors


def test_a_refused_file_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"no such format")
    code, output, errors = run("import", str(file))
    assert (code, output) == (1, "")
    assert errors.splitlines()[-1].startswith(f"error: {file}: not a GGUF file")


def test_pull_takes_the_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = TinyGguf("llama").write(tmp_path / "tiny.gguf")
    monkeypatch.setattr(store, "download_default_gguf", lambda _folder, _progress: file)
    code, output, _ = run("pull")
    assert code == 0
    assert output == f"{DEFAULT_MODEL} is ready in {tmp_path / 'home' / 'models' / DEFAULT_MODEL}\n"


@pytest.mark.parametrize(("flag", "calibrated"), [("--calibrate", True), ("--no-calibrate", False)])
def test_pull_calibrates_unless_it_is_told_not_to(tmp_path: Path, segue_home: Path, flag: str, calibrated: bool) -> None:
    run("import", str(TinyGguf("llama").write(tmp_path / "tiny.gguf")), "--name", "mine")
    made = calibration_file(segue_home / "models/mine", "")
    made.unlink()
    assert run("pull", "mine", flag)[0] == 0
    assert made.exists() is calibrated


def test_pull_of_an_unknown_name(tmp_path: Path) -> None:
    code, _, errors = run("pull", "nonsense")
    assert code == 1
    assert "error: no model 'nonsense'" in errors


@pytest.mark.parametrize("command", ["pull", "import", "list"])
def test_each_command_explains_itself(command: str) -> None:
    code, output, _ = run(command, "--help")
    assert code == 0
    assert "Usage" in output
