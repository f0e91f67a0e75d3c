"""One peer as a process of its own, pinned to one core: started, asked, ended.

    with Peer(spec, core=1) as peer:      loads the model; minutes, the first time that vLLM compiles
        peer.prefill_s(1024)
        peer.decode_step_s(16, 256)

Between questions the process waits in a read and takes no time from others. It ends when the block ends, and is killed by the
kernel if this process dies. What it prints is in its log.

On a busy machine the clock "cpu" counts only the seconds that the peer computes; with one thread and nothing else on its core,
both clocks agree.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import deploy.child
from bench.peers.catalog import PeerSpec
from deploy.child import log_tail
from segue.errors import SegueError
from segue.paths import logs_dir

Clock = Literal["wall", "cpu"]
DECODE_STEPS = 8
_ANSWER_LIMIT_S = 1200.0
_STOP_S = 10.0
_READ_BYTES = 65_536
_SERVE = Path(__file__).parent / "drivers" / "serve.py"
_TETHER = Path(deploy.child.__file__).with_name("tether.py")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class PeerError(SegueError):
    """A peer did not start, died or did not answer; the message ends with its log."""


class PeerCannot(PeerError):
    """The peer says that it cannot do what was asked, and why. It can be asked something else."""


class Peer:
    """See the module. `facts` is known once the block was entered: `version` and `format` at least."""

    def __init__(self, spec: PeerSpec, core: int, *, clock: Clock = "wall", limit_s: float = _ANSWER_LIMIT_S) -> None:
        self.name = spec.name
        self.facts: Mapping[str, str] = {}
        self.log = logs_dir() / f"peer-{spec.name}-{os.getpid()}.log"
        self._spec = spec
        self._core = core
        self._clock = clock
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds for a prompt of random tokens that the peer has not seen before."""
        return self._ask({"do": "prefill", "tokens": num_tokens})

    def decode_step_s(self, batch: int, context: int, steps: int = DECODE_STEPS) -> float:
        """Seconds per step, the median of `steps`: each of `batch` sequences of `context` tokens gets one more."""
        return self._ask({"do": "decode", "batch": batch, "context": context, "steps": steps})

    def __enter__(self) -> Self:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        spec = self._spec
        options = {"core": self._core, "clock": self._clock, "driver": spec.driver, "model": str(spec.model), **spec.options}
        tether = [sys.executable, "-I", "-S", str(_TETHER), str(os.getpid())]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*tether, str(spec.python), str(_SERVE), json.dumps(options)],
                env={**_clean_environment(), **_ONE_THREAD, **spec.env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a Ctrl-C at the terminal reaches the benchmark, which ends its peers in `__exit__`
            )
        try:
            self.facts = self._receive(self._process)["ready"]
        except BaseException:
            self._end(self._process)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process is not None:
            self._end(self._process)

    def _ask(self, request: Mapping[str, Any]) -> float:
        process = self._process
        if process is None or process.stdin is None:
            raise RuntimeError("the peer was not entered")
        with suppress(BrokenPipeError):  # it died; the read below tells
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        reply = self._receive(process)
        if "error" in reply:
            raise PeerCannot(f"{self.name}: {reply['error']}")
        return float(reply["seconds"])

    def _receive(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        """The next line. Raises PeerError at the end of the peer or of the time allowed."""
        assert process.stdout is not None
        until_s = time.monotonic() + self._limit_s
        while b"\n" not in self._unread:
            if not select.select([process.stdout], [], [], max(0.0, until_s - time.monotonic()))[0]:
                process.kill()  # it is not asked again: a late answer would be taken for the next one
                raise self._failed(f"said nothing for {self._limit_s:.0f} s")
            if not (data := os.read(process.stdout.fileno(), _READ_BYTES)):
                with suppress(subprocess.TimeoutExpired):  # its last words, a traceback, come after it closed its stdout
                    process.wait(_STOP_S)
                raise self._failed("ended")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _failed(self, how: str) -> PeerError:
        return PeerError(f"{self.name} {how}; the end of its log, {self.log}:\n{log_tail(self.log)}")

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._process = None


def _clean_environment() -> dict[str, str]:
    """Without what points a Python at another environment's packages."""
    return {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
