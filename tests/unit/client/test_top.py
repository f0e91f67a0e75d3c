"""`segue top`: what it draws, and how it treats the terminal."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import select
import sys
import termios
from typing import Any

import pytest
import typer
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from deploy.cli.top import frame, sparkline, strip, top
from router.waterfall import Span
from segue.errors import PermissionDenied
from segue.v1 import inference_pb2 as pb
from segue.v1.operator_pb2 import GetOverviewResponse, Latency, LatencyPoint, RequestRecord

LIMIT_S = 30.0


def overview(num_requests: int = 2) -> GetOverviewResponse:
    load = pb.WorkerLoad(running_requests=1, free_blocks=5, leased_blocks=2, cached_blocks=3, total_blocks=10)
    attempt = pb.Attempt(queue_s=0.5, prefill_s=0.5, transfer_exposed_s=0.25, decode_s=0.75)
    path = pb.RequestPath(prefill_worker="prefill-0", decode_worker="decode-0", ttft_s=1.0, timeline=[attempt])
    records = [
        RequestRecord(request_id=f"req_{number:024}", outcome="ok", num_prompt_tokens=7, num_output_tokens=9, paths=[path])
        for number in range(num_requests)
    ]
    return GetOverviewResponse(
        cluster=pb.GetClusterStatusResponse(
            model="tiny",
            version="0.1.0",
            workers=[pb.WorkerStatus(worker_id="decode-0", roles=["decode"], state="ready", load=load)],
            active_requests=3,
            membership_fresh=True,
            transfers=[
                pb.TransferRate(prefill_worker="prefill-0", decode_worker="decode-0", bytes_per_s=3 * 2**20),
                pb.TransferRate(prefill_worker="prefill-1", decode_worker="decode-0", bytes_per_s=2**20),
            ],
        ),
        requests=records,
        ttft=Latency(
            count=5, p50_s=0.1, p99_s=0.4, point_s=5.0, points=[LatencyPoint(age_s=7.0, count=5, p50_s=0.1, p99_s=0.4)]
        ),
    )


def lines_of(shown: GetOverviewResponse, width: int, num_requests: int = 10) -> list[str]:
    written = io.StringIO()
    Console(file=written, width=width).print(frame(shown, width, num_requests))
    return [line.rstrip() for line in written.getvalue().splitlines()]


def test_a_frame_has_it_all() -> None:
    lines = lines_of(overview(), 160)
    assert lines[0] == "tiny · Segue 0.1.0 · 3 active requests"
    assert lines[2].split()[:3] == ["decode-0", "decode", "ready"]
    assert [line.count("━") for line in lines if line.startswith("KV ")] == [20, 7]
    assert lines[6].split()[1:] == ["prefill-1", "━━━━━━━▶", "decode-0", "1.00", "MiB/s"]
    ttft = next(line for line in lines if line.startswith("TTFT"))
    assert ttft.split()[1:7] == ["p50", "100.0", "ms", "p99", "400.0", "ms"]
    assert ttft.endswith("█")
    assert any(line.startswith("token gap nothing measured") for line in lines)
    first, second = lines[-2:]
    assert first.split()[:6] == ["00000000", first.split()[1], "ok", "7", "9", "1,000.0"]
    assert "prefill-0 → decode-0" in second
    assert first.count("█") == 40


def test_a_small_terminal_holds_a_frame() -> None:
    lines = lines_of(overview(30), 80, num_requests=4)
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    assert sum(line.startswith("0000") for line in lines) == 4


def test_without_any_request_it_says_so() -> None:
    assert lines_of(GetOverviewResponse(), 80)[-1] == "this router has served no request yet"


def test_points_have_their_place_in_time() -> None:
    points = [LatencyPoint(age_s=age_s, count=1, p99_s=p99_s) for age_s, p99_s in ((310.0, 1.0), (298.0, 4.0), (3.0, 0.5))]
    drawn = sparkline(Latency(count=3, point_s=5.0, points=points))
    assert (len(drawn), drawn[0], drawn[-1], drawn[1:-1].strip()) == (60, "█", "▂", "")


def test_a_strip_shows_what_was_waited_for() -> None:
    spans = [Span("prefill", 0.0, 2.0, 0.0), Span("transfer", 1.0, 2.5, 2.0), Span("2. decode", 2.5, 4.0, 2.5)]
    bar = strip(spans, 8)
    assert bar.plain == "█" * 8
    assert [str(piece.style) for piece in bar.spans] == ["blue"] * 2 + ["cyan"] * 3 + ["green"] * 3
    assert strip([], 8).plain == ""


@pytest.fixture
def run(router: Any) -> Any:
    app = typer.Typer()
    app.command()(top)

    async def run_command(*words: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, app, ["--address", router.address, *words])

    return run_command


async def test_piped_on_it_prints_one_frame(router: Any, run: Any) -> None:
    router.unary = [overview(20)]
    result = await run()
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stdout
    assert result.stdout.count("prefill-0 → decode-0") == 10
    router.unary = [PermissionDenied("this needs observe or operate")]
    refused = await run("--once")
    assert (refused.exit_code, "needs observe or operate" in refused.stderr) == (1, True)


async def test_a_terminal_is_left_as_it_was(router: Any) -> None:
    router.unary = [overview() for _ in range(60)]
    leader, follower = pty.openpty()
    before = termios.tcgetattr(follower)
    command = [sys.executable, "-c", "from deploy.cli import main; main()", "top", "--address", router.address]
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    process = await asyncio.create_subprocess_exec(*command, stdin=follower, stdout=follower, stderr=follower, env=env)
    try:
        shown = await asyncio.to_thread(read_until, leader, b"decode-0")
        assert b"\x1b[?1049h" in shown, "a screen of its own"
        assert not termios.tcgetattr(follower)[3] & termios.ECHO
        os.write(leader, b"xq")
        await asyncio.to_thread(read_until, leader, b"\x1b[?1049l")
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert termios.tcgetattr(follower) == before
    os.close(leader)
    os.close(follower)


def read_until(file: int, end: bytes) -> bytes:
    read = b""
    while end not in read:
        assert select.select([file], [], [], LIMIT_S)[0], f"{end!r} did not come"
        read += os.read(file, 4096)
        assert len(read) < 2**20, f"{end!r} is not among all that came"
    return read
