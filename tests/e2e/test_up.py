"""`segue up` as a newcomer runs it: the real model under a real Ray, a worker killed, Ctrl-C, and what is left."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from deploy.ray_cluster import FOLDER_PREFIX, TEMP_ROOT
from deploy.sweeper import session_members
from segue import AsyncClient
from tests.support.leaks import assert_no_leaks_at

COMMAND = (sys.executable, "-c", "from deploy.cli import main; main()")
FLAGS = ("--http-port", "0", "--grpc-port", "0", "--kv-memory", "128MiB")


@dataclass
class Up:
    """A `segue up` that runs, and what it has printed."""

    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)

    async def line_with(self, pattern: str) -> str:
        """The next line that has `pattern`; fails at the end of the output."""
        assert self.process.stdout is not None
        async for raw in self.process.stdout:
            self.lines.append(raw.decode().rstrip())
            if re.search(pattern, self.lines[-1]):
                return self.lines[-1]
        raise AssertionError("\n".join(["it ended:", *self.lines]))

    def pid_of(self, name: str) -> int:
        """From the table of processes."""
        return next(int(match[1]) for line in self.lines if (match := re.match(rf"{name}\s.*?\s(\d+)\s", line)))

    def sessions(self) -> list[int]:
        """The children of the launcher, each of which leads a session of all that it starts."""
        return [int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()]


@asynccontextmanager
async def segue_up(*flags: str) -> AsyncIterator[Up]:
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "up", *FLAGS, *flags, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        yield Up(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def what_is_left(up: Up, sessions: list[int]) -> list[object]:
    """Processes of these sessions, and folders of this launcher's Ray."""
    folders = TEMP_ROOT.glob(f"{FOLDER_PREFIX}{up.process.pid}-*")
    return [*(pid for session in sessions for pid in session_members(session)), *folders]


async def test_start_serve_lose_a_worker_and_stop(real_model_dir: Path) -> None:
    async with segue_up("--model", str(real_model_dir)) as up:
        serving = await up.line_with("serving ")
        http, grpc = re.findall(r"127\.0\.0\.1:\d+", serving)
        # The sample's way: a prompt as short as that may be computed where it is decoded.
        assert any("prefill-0 → decode-0 over shm" in line or "decode-0, both phases" in line for line in up.lines)
        async with httpx.AsyncClient(timeout=60.0) as client:
            assert (await client.get(f"http://{http}/ready")).status_code == 200
        async with AsyncClient(grpc) as client:
            before = await client.generate("The capital of France is", max_tokens=8, temperature=0.0)

            for worker in ("decode-0", "prefill-0"):
                os.kill(up.pid_of(worker), signal.SIGKILL)
                async with asyncio.timeout(15):  # what is promised for a restart
                    await up.line_with(f"{worker} was restarted")
                    await client.wait_ready()
                    after = await client.generate("The capital of France is", max_tokens=8, temperature=0.0)
                assert after.token_ids == before.token_ids
            await assert_no_leaks_at(grpc)

        sessions = up.sessions()
        assert len(what_is_left(up, sessions)) > 8  # Valkey, Ray and its helpers, workers, router, a folder
        up.process.send_signal(signal.SIGINT)
        await up.line_with("stopped")
        assert await up.process.wait() == 0
        assert not what_is_left(up, sessions)


async def test_a_killed_launcher_takes_all_with_it(real_model_dir: Path) -> None:
    async with segue_up("--model", str(real_model_dir)) as up:
        await up.line_with(r"ray: \d")  # Ray runs, the workers are loading
        sessions = up.sessions()
        assert len(what_is_left(up, sessions)) > 8
        up.process.kill()
        await up.process.wait()
        async with asyncio.timeout(15):
            while what_is_left(up, sessions):  # noqa: ASYNC110  # the kernel and the sweeper tell nobody
                await asyncio.sleep(0.1)


async def test_what_is_wrong_is_told_in_a_line_and_nothing_is_left(tmp_path: Path) -> None:
    async with segue_up("--model", str(tmp_path)) as up:
        await up.line_with("error: ")
        assert await up.process.wait() == 1
        assert "Traceback" not in "\n".join(up.lines)
