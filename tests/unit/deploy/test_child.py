"""Children are read, stopped, and never outlive whoever started them."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.child import Child, FirstWord, log_tail, parse_event
from deploy.waiting import until_gone
from segue.errors import ConfigError, InternalError

OBEDIENT = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(7)); print('ready', flush=True); time.sleep(600)"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"


async def start(code: str, log: Path, on_line: Callable[[str], None] = lambda line: None, stdin: bytes = b"") -> Child:
    return await Child.start("child", [sys.executable, "-c", code], log=log, stdin=stdin, on_line=on_line)


async def test_output_goes_to_the_log_and_stdout_lines_to_the_reader(tmp_path: Path) -> None:
    lines: list[str] = []
    code = "import sys; print(sys.stdin.read()); sys.stderr.write('aside\\n')"
    child = await start(code, tmp_path / "logs/child.log", lines.append, stdin=b"a secret")
    assert await child.exited == 0
    assert lines == ["a secret"]
    assert set((tmp_path / "logs/child.log").read_text().splitlines()) == {"a secret", "aside"}
    assert (tmp_path / "logs/child.log").stat().st_mode & 0o077 == 0


async def test_stop_asks_first(tmp_path: Path) -> None:
    first_line: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    child = await start(OBEDIENT, tmp_path / "log", first_line.set_result)
    await first_line
    await child.stop(grace_s=60)
    assert child.exited.result() == 7


async def test_stop_kills_a_child_that_does_not_listen(tmp_path: Path) -> None:
    first_line: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    child = await start(STUBBORN, tmp_path / "log", first_line.set_result)
    await first_line
    await child.stop(grace_s=0.01)
    assert child.exited.result() == -signal.SIGKILL
    assert child.ending() == "child was killed by SIGKILL"
    await child.stop(grace_s=0)  # once more does no harm


async def test_a_child_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    """The launcher cannot tidy up after SIGKILL; the kernel does."""
    launcher = (
        "import asyncio, os, sys; from pathlib import Path; from deploy.child import Child\n"
        "async def main():\n"
        f"    child = await Child.start('child', [sys.executable, '-c', {STUBBORN!r}], log=Path(sys.argv[1]),\n"
        "                              on_line=lambda line: print(child_pid(), flush=True))\n"
        "    globals().update(child=child)\n"
        "    await asyncio.Event().wait()\n"
        "def child_pid(): return child.pid\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", launcher, str(tmp_path / "log"), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    os.kill(pid, 0)  # it runs
    parent.kill()
    await parent.communicate()
    async with asyncio.timeout(10):
        await until_gone(pid)


async def test_first_word_is_where_it_serves(tmp_path: Path) -> None:
    said = FirstWord()
    code = 'print("noise"); print(\'{"event": "serving", "http": "127.0.0.1:1"}\', flush=True); import time; time.sleep(600)'
    child = await start(code, tmp_path / "log", said.on_line)
    assert await said.of(child) == {"event": "serving", "http": "127.0.0.1:1"}
    await child.stop(grace_s=60)


async def test_first_word_may_be_why_it_does_not_serve(tmp_path: Path) -> None:
    said = FirstWord()
    code = 'print(\'{"event": "failed", "code": "config", "error": "bad port"}\'); raise SystemExit(1)'
    child = await start(code, tmp_path / "log", said.on_line)
    with pytest.raises(ConfigError, match="child: bad port"):
        await said.of(child)
    await child.exited


async def test_a_death_without_a_word_is_told_with_the_end_of_the_log(tmp_path: Path) -> None:
    said = FirstWord()
    child = await start("1 / 0", tmp_path / "log", said.on_line)
    with pytest.raises(InternalError, match=r"(?s)child exited with status 1.*ZeroDivisionError"):
        await said.of(child)


def test_log_tail_is_the_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert log_tail(log) == "  (no log)"
    log.write_bytes(b"")
    assert log_tail(log) == "  (empty)"
    log.write_bytes(b"\xff\n" + b"x\n" * 100_000 + b"last\n")
    assert log_tail(log, max_lines=2) == "  x\n  last"


@pytest.mark.parametrize("line", ["", "text", "[1]", '"event"', "{}", '{"event": 1}'])
def test_other_output_is_no_event(line: str) -> None:
    assert parse_event(line) is None
