"""`segue drain`, `restart`, `role` and `explain`, against a scripted router."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import pytest
import typer
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from deploy.cli.drain import drain
from deploy.cli.explain import Span, bar_of, explain, render
from deploy.cli.restart import restart
from deploy.cli.role import role
from deploy.cli.worker_commands import seconds
from segue.errors import ConfigError, InvalidRequest
from segue.v1 import inference_pb2 as pb
from segue.v1 import operator_pb2


def status(*workers: pb.WorkerStatus, routers: tuple[str, ...] = ()) -> pb.GetClusterStatusResponse:
    return pb.GetClusterStatusResponse(workers=workers, routers=[pb.RouterStatus(grpc_address=address) for address in routers])


def worker(state: str, epoch: int = 1, name: str = "decode-0", **fields: Any) -> pb.WorkerStatus:
    return pb.WorkerStatus(worker_id=name, state=state, epoch=epoch, roles=["decode"], **fields)


@pytest.fixture
def run(router: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("deploy.cli.worker_commands._BETWEEN_LOOKS_S", 0.0)
    app = typer.Typer()
    for command in (drain, restart, role, explain):
        app.command()(command)

    async def run_command(*words: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, app, [words[0], "--address", router.address, *words[1:]])

    return run_command


async def test_drain_waits_and_shows_what_is_left(router: Any, run: Any) -> None:
    busy = worker("draining", load=pb.WorkerLoad(running_requests=2, leased_blocks=7))
    router.unary = [operator_pb2.DrainWorkerResponse(worker=busy), status(busy), status(worker("drained"))]
    result = await run("drain", "decode-0", "--grace", "2m")
    assert result.exit_code == 0, result.output
    assert "decode-0: 2 running, 0 waiting, 0 tickets, 7 blocks held" in result.stderr
    assert result.stdout.startswith("decode-0 is drained and holds nothing")
    assert router.requests[0] == operator_pb2.DrainWorkerRequest(worker_id="decode-0", grace_s=120.0)


async def test_drain_undone_or_refused(router: Any, run: Any) -> None:
    router.unary = [
        operator_pb2.DrainWorkerResponse(worker=worker("ready")),
        InvalidRequest("worker_id", "decode-0 is the only ready decode worker"),
    ]
    assert (await run("drain", "decode-0", "--undo")).stdout == "decode-0 takes requests again\n"
    assert router.requests[0].undo
    refused = await run("drain", "decode-0")
    assert (refused.exit_code, "only ready decode worker" in refused.stderr) == (1, True)


async def test_a_rolling_restart_takes_one_after_the_other(router: Any, run: Any) -> None:
    first, second = worker("ready", 1, "a"), worker("ready", 2, "b")
    answer = operator_pb2.RestartWorkerResponse()
    router.unary = [
        status(second, first),
        answer,
        status(worker("draining", 1, "a"), second),
        status(worker("lost", 1, "a"), second),
        status(second),
        status(worker("ready", 3, "a"), second),
        answer,
        status(worker("ready", 3, "a"), worker("ready", 4, "b")),
    ]
    result = await run("restart", "--rolling")
    assert result.stdout == "[1/2] a serves again\n[2/2] b serves again\n"
    assert [request.worker_id for request in router.requests if hasattr(request, "grace_s")] == ["a", "b"]


async def test_restart_of_nothing_and_of_an_unknown_worker(router: Any, run: Any) -> None:
    router.unary = [status(worker("ready")), status(worker("ready"))]
    assert "give --rolling for all of them" in (await run("restart")).stderr
    assert "there is no worker x; there are: decode-0" in (await run("restart", "x")).stderr


async def test_role(router: Any, run: Any) -> None:
    flipped = pb.WorkerStatus(worker_id="decode-0", roles=["prefill"], roles_until_unix_s=5.0)
    router.unary = [operator_pb2.SetWorkerRoleResponse(worker=flipped)]
    assert (await run("role", "decode-0", "prefill", "--for", "10m")).stdout == "decode-0 is a prefill worker now for 10m\n"
    assert router.requests[0].lease_s == 600.0


RECORD = operator_pb2.RequestRecord(
    request_id="req_1",
    api="chat",
    outcome="ok",
    paths=[
        pb.RequestPath(
            prefill_worker="prefill-1",
            decode_worker="decode-0",
            transport="shm",
            placement="disaggregated",
            prefill_cached_tokens=32,
            timeline=[
                pb.Attempt(prefill_worker="prefill-0", queue_s=0.1, prefill_s=0.4, error_code="worker_lost", error="it died"),
                pb.Attempt(
                    prefill_worker="prefill-1",
                    decode_worker="decode-0",
                    start_s=0.5,
                    reserve_s=0.125,
                    prefill_s=1.0,
                    prefill_queue_s=0.25,
                    transfer_hidden_s=0.5,
                    transfer_exposed_s=0.5,
                    decode_s=2.0,
                ),
            ],
        )
    ],
)


def test_the_waterfall() -> None:
    width = len("2. transfer") + 40 + len("1,000,000.0 ms") + len("prefill-0") + 3
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(render(RECORD, width))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert "prefill-1 → decode-0 over shm (disaggregated), 0.0 MiB; cached tokens: 32 prefill" in " ".join(lines)
    rows = {line[:11].strip(): line for line in lines if line[:2] in {"1.", "2."}}
    assert list(rows) == ["1. queue", "1. prefill"] + [f"2. {name}" for name in ("reserve", "prefill", "transfer", "decode")]
    assert lines[-1] == "attempt 1 failed: worker_lost: it died"
    # Four seconds on forty columns.
    assert (rows["2. prefill"].count("░"), rows["2. prefill"].count("█")) == (3, 7)
    assert (rows["2. transfer"].count("░"), rows["2. transfer"].count("█")) == (5, 5)
    assert rows["2. decode"].count("█") == 20


@pytest.mark.parametrize(
    ("span", "bar"),
    [
        (Span("decode", 0.0, 1.0, 0.0), "██████████"),
        (Span("decode", 0.999, 1.0, 0.999), " " * 9 + "█"),
        (Span("queue", 0.5, 0.5, 0.5), " " * 5),
        (Span("transfer", 0.2, 0.6, 0.5), "  ░░░█"),
    ],
)
def test_bars(span: Span, bar: str) -> None:
    assert bar_of(span, 1.0, 10) == bar


async def test_explain_asks_every_router(router: Any, run: Any) -> None:
    router.unary = [InvalidRequest("request_id", "unknown here"), status(routers=(router.address,))]
    missing = await run("explain", "req_9")
    assert (missing.exit_code, "unknown here" in missing.stderr) == (1, True)
    router.unary = [operator_pb2.ExplainResponse(record=RECORD)]
    found = json.loads((await run("explain", "req_1", "--json")).stdout)
    assert found["paths"][0]["timeline"][0]["error_code"] == "worker_lost"


@pytest.mark.parametrize(("text", "wanted_s"), [("90", 90), ("500ms", 0.5), ("10m", 600), ("1.5h", 5400), (" 2D ", 172_800)])
def test_durations(text: str, wanted_s: float) -> None:
    assert seconds(text, "--for") == wanted_s


@pytest.mark.parametrize("text", ["", "soon", "-1s", "1w"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ConfigError, match="--for"):
        seconds(text, "--for")
