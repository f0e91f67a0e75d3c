"""A process that does what it is asked: one JSON object a line goes in, one comes back. It never outlives this process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import deploy.child
from deploy.child import log_tail
from segue.errors import InternalError
from segue.paths import logs_dir

_TETHER = Path(deploy.child.__file__).with_name("tether.py")
_ANSWER_LIMIT_S = 120.0
_STOP_S = 10.0


class AskedProcess:
    """`async with AskedProcess(name, command) as process`: the process ends with the block. What it prints on stderr is in
    its log."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str] | None = None, *, rests: bool = False) -> None:
        """`env` is added to this process's own environment. One that `rests` is stopped, with its children, from an answer to
        the next question: it might else take the processor from whatever is measured meanwhile."""
        self._name = name
        self._command = command
        self._env = {**os.environ, **(env or {})}
        self._rests = rests
        self._log = logs_dir() / f"bench-{name}-{os.getpid()}.log"

    async def __aenter__(self) -> Self:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        tether = (sys.executable, "-I", "-S", str(_TETHER), str(os.getpid()))
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *tether,
                *self._command,
                env=self._env,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _STOP_S)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Raises InternalError when the process ends or says nothing."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), _ANSWER_LIMIT_S)
        except TimeoutError:
            line = b""
        if not line:
            raise InternalError(f"{self._name} did not answer; the end of its log, {self._log}:\n{log_tail(self._log)}")
        self._signal(signal.SIGSTOP)
        answer: Mapping[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        """To the process and its children, if it rests at times."""
        if self._rests and self._process.returncode is None:
            os.killpg(self.pid, number)
