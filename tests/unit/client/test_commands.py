"""`segue generate`, `chat` and `status`, against a scripted router."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable
from typing import Any

import pytest
import typer
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from deploy.cli.answer import describe_path, follow, footer
from deploy.cli.chat import chat
from deploy.cli.generate import generate
from deploy.cli.status import blocks_bar, render, status
from segue.client import ClusterStatus, Completed, Output, RequestPath, Started, WorkerLoad, WorkerStatus
from segue.errors import InternalError, NoWorker
from segue.sampling import FinishReason, GeneratedToken
from segue.v1 import inference_pb2 as pb

NOBODY = "127.0.0.1:1"
Run = Callable[..., Any]


@pytest.fixture
def run(router: Any) -> Run:
    app = typer.Typer()
    for command in (generate, chat, status):
        app.command()(command)

    async def run_command(*words: str, stdin: str | bytes = "", address: str | None = None) -> Result:
        line = [words[0], "--address", address or router.address, *words[1:]]
        return await asyncio.to_thread(CliRunner().invoke, app, line, stdin)

    return run_command


@pytest.fixture
def model_list() -> pb.ListModelsResponse:
    return pb.ListModelsResponse(models=[pb.Model(id="tiny")])


async def test_generate_prints_the_text_and_how_it_went(router: Any, run: Run, script: Any) -> None:
    router.scripts = [script.whole_answer]
    result = await run("generate", "Say hello", "-n", "2", "-t", "0", "--seed", "5", "--stop", "a", "--stop", "b")
    assert (result.exit_code, result.stdout) == (0, "Hello\n")
    assert result.stderr.startswith("3 prompt + 2 output tokens · first token ")
    assert result.stderr.rstrip().endswith("prefill-0 → decode-0 over shm, hand-over 250.0 ms")
    (request,) = router.requests
    assert [(message.role, message.content) for message in request.chat.messages] == [("user", "Say hello")]
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed, list(sampling.stop)) == (2, 0, 5, ["a", "b"])
    assert not sampling.HasField("top_p")


async def test_generate_raw_from_stdin_as_json(router: Any, run: Run, script: Any) -> None:
    router.scripts = [script.whole_answer]
    result = await run("generate", "-", "--raw", "--json", stdin="Où est\n")
    answer = json.loads(result.stdout)
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == ("Hello", [7, 8], "length")
    assert answer["path"]["decode_worker"] == "decode-0"
    assert answer["ttft_s"] > 0
    assert (router.requests[0].text, result.stderr) == ("Où est\n", "")


async def test_generate_with_a_system_message(router: Any, run: Run, script: Any) -> None:
    router.scripts = [script.whole_answer]
    await run("generate", "hi", "--system", "Be brief.")
    assert [message.role for message in router.requests[0].chat.messages] == ["system", "user"]
    result = await run("generate", "hi", "--system", "Be brief.", "--raw")
    assert (result.exit_code, result.stderr) == (1, "error: --system: needs the chat template; leave out --raw\n")


async def test_generate_refuses_what_is_not_text(run: Run) -> None:
    result = await run("generate", "-", stdin=b"\xff\xfe")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: prompt: standard input is not UTF-8")


async def test_an_error_after_some_text_ends_the_command(router: Any, run: Run, script: Any) -> None:
    router.scripts = [[script.started, script.output("Hel", 7), InternalError("decode-0 died")]]
    result = await run("generate", "x")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "Hel", "error: decode-0 died\n")


@pytest.mark.parametrize("words", [("generate", "x"), ("chat",), ("status",), ("status", "--json"), ("status", "--watch")])
async def test_nobody_serves_there(run: Run, words: tuple[str, ...]) -> None:
    result = await run(*words, address=NOBODY)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"error: no Segue cluster answers at {NOBODY}; check --address, or start one with: segue up\n"


async def test_chat_sends_the_conversation_and_can_begin_anew(
    router: Any, run: Run, script: Any, model_list: pb.ListModelsResponse
) -> None:
    router.unary, router.scripts = [model_list], [script.whole_answer] * 3
    result = await run("chat", "--system", "Be kind.", stdin="one\n\ntwo\n/nonsense\n/reset\nthree\n/exit\nnever\n")
    assert result.exit_code == 0
    asked = [[message.content for message in request.chat.messages] for request in router.requests[1:]]
    assert asked == [["Be kind.", "one"], ["Be kind.", "one", "Hello", "two"], ["Be kind.", "three"]]
    assert "there is no /nonsense" in result.stderr
    assert result.stdout.count("Hello") == 3


async def test_chat_goes_on_after_an_error_and_ends_with_its_input(
    router: Any, run: Run, script: Any, model_list: pb.ListModelsResponse
) -> None:
    failing = [script.started, script.output("Hel", 7), InternalError("decode-0 died")]
    refused = [NoWorker("no decode worker")]
    router.unary, router.scripts = [model_list], [refused, refused, refused, failing, script.whole_answer]
    result = await run("chat", stdin="lost\nhalf\nwhole\n")
    assert result.exit_code == 0
    assert "error: no decode worker" in result.stderr
    assert "error: decode-0 died" in result.stderr
    # The unanswered question is taken back; the half answer stays.
    assert [message.content for message in router.requests[-1].chat.messages] == ["half", "Hel", "whole"]


async def test_ctrl_c_ends_the_answer_and_not_the_chat(router: Any, script: Any, model_list: pb.ListModelsResponse) -> None:
    router.unary = [model_list]
    router.scripts = [[script.started, script.output("Hel", 7), script.hold], script.whole_answer]
    # As at a terminal, also when the tests themselves run in the background, where Ctrl-C is ignored.
    program = (
        "import signal, typer; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from deploy.cli.chat import chat; typer.run(chat)"
    )
    words = (sys.executable, "-c", program, "--address", router.address)
    child = await asyncio.create_subprocess_exec(*words, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    assert child.stdin
    assert child.stdout
    try:
        child.stdin.write(b"one\n")
        await asyncio.wait_for(child.stdout.readuntil(b"Hel"), 20)
        child.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(router.left.get(), 20) == "cancelled"
        _, notes = await asyncio.wait_for(child.communicate(b"two\n"), 20)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    assert (child.returncode, b"ended here" in notes) == (0, True)
    assert [message.content for message in router.requests[-1].chat.messages] == ["one", "Hel", "two"]


def cluster_status() -> pb.GetClusterStatusResponse:
    load = pb.WorkerLoad(
        free_blocks=5,
        leased_blocks=2,
        cached_blocks=3,
        total_blocks=10,
        running_requests=1,
        waiting_requests=4,
        queued_tokens=77,
    )
    worker = pb.WorkerStatus(worker_id="prefill-0", epoch=3, roles=["prefill"], state="ready", pid=42, host="here", load=load)
    return pb.GetClusterStatusResponse(model="tiny", version="0.1.0", workers=[worker], active_requests=6)


async def test_status_shows_workers_and_what_is_wrong(router: Any, run: Run) -> None:
    router.unary = [cluster_status()]
    result = await run("status")
    assert result.exit_code == 0
    title, _, row, *_ = result.stdout.splitlines()
    assert title == "tiny · Segue 0.1.0 · 6 active requests"
    assert row.split()[:8] == ["prefill-0", "prefill", "ready", "1", "4", "77", "██▒▒▒▒······", "5/10"]
    assert "cannot serve: no ready worker for decode" in result.stdout
    assert "the membership store cannot be reached" in result.stdout


def test_status_fits_a_small_terminal() -> None:
    load = load_of(leased=1, cached=900, total=1000)
    worker = WorkerStatus("prefill-0", 12, ("prefill",), "draining", "127.0.0.1:50000", 123456, "host", load)
    cluster = ClusterStatus("tiny", (worker,), 3, membership_fresh=True, version="0.1.0")
    for width, wide in ((80, False), (120, True)):
        written = io.StringIO()
        Console(file=written, width=width).print(render(cluster, wide=wide))
        _, header, row, _ = written.getvalue().splitlines()
        assert header.split()[:6] == ["worker", "roles", "state", "run", "wait", "queued"]
        assert "…" not in row
        assert "901/1000 123456" in " ".join(row.split())
        assert ("127.0.0.1:50000" in row) is wide


async def test_status_as_json(router: Any, run: Run) -> None:
    router.unary = [cluster_status()]
    shown = json.loads((await run("status", "--json")).stdout)
    assert shown["workers"][0]["load"]["cached_blocks"] == 3
    assert shown["membership_fresh"] is False


def load_of(leased: int, cached: int, total: int) -> WorkerLoad:
    blocks = {"free_blocks": total - leased - cached, "leased_blocks": leased, "cached_blocks": cached, "total_blocks": total}
    return WorkerLoad(**{name: blocks.get(name, 0) for name in WorkerLoad.__dataclass_fields__})


@pytest.mark.parametrize(
    ("leased", "cached", "total", "bar"),
    [
        (0, 0, 0, "    "),
        (0, 0, 100, "····"),
        (1, 1, 1000, "█▒··"),
        (100, 0, 100, "████"),
        (99, 1, 100, "████"),
        (50, 50, 100, "██▒▒"),
    ],
)
def test_blocks_bar_has_one_width_and_hides_nothing_small(leased: int, cached: int, total: int, bar: str) -> None:
    assert blocks_bar(load_of(leased, cached, total), width=4) == bar


def path(prefill: str, decode: str, attempts: int = 1) -> RequestPath:
    return RequestPath(prefill, decode, "tcp", 0, 0, 0, 0, 0.1, 0.002, 0.5, attempts)


def test_paths_are_described_as_long_as_they_were() -> None:
    assert describe_path(path("p", "")) == "p"
    assert describe_path(path("w", "w")) == "w, both phases"
    assert describe_path(path("p", "d")) == "p → d over tcp, hand-over 2.0 ms"
    assert describe_path(path("p", "d", attempts=2)).endswith(", attempt 2")


def test_times_count_from_asking_to_the_first_token_and_on_from_there() -> None:
    times_s = iter([10.0, 10.5, 10.75, 11.0])
    token = GeneratedToken(1)
    pieces: list[str] = []
    events = [
        Started("r", "tiny", 3, 0, 0),
        Output(0, "", (token,), None),
        Output(0, "ab", (token,), None),
        Output(1, "not shown", (), None),
        Output(0, "c", (token,), FinishReason.STOP),
        Completed(3, 3, (path("p", "d"),)),
    ]
    answer = follow(events, pieces.append, clock=lambda: next(times_s))
    assert (answer.ttft_s, answer.tokens_per_s, pieces) == (0.5, 4.0, ["ab", "c"])
    assert footer(answer) == ("3 prompt + 3 output tokens · first token 500 ms · 4.0 tok/s · p → d over tcp, hand-over 2.0 ms")
