"""A program that starts worker processes quickly: it has loaded all that they import, and forks.

Each line of its stdin is one worker's environment, in JSON, to which it answers with the pid in a line of its own. Workers are
real processes, `deploy.worker` to the letter, but for the seconds that imports take. They end with this process.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys

from deploy.worker import main as serve_as_worker
from segue.runtime import run_process

_PR_SET_PDEATHSIG = 1


def be_worker(env: dict[str, str]) -> int:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(env)
    with open(env["LOG"], "a") as log:  # what it says on stdout and stderr
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    return run_process(serve_as_worker)


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries them
    gc.freeze()
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            os._exit(be_worker(json.loads(line)))
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
