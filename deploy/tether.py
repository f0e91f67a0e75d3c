"""`python -I -S tether.py PARENT_PID COMMAND...` becomes COMMAND, killed by the kernel the moment its parent dies.

A launcher that is killed with SIGKILL cannot tidy up, so the kernel does it (PR_SET_PDEATHSIG survives exec). A program of its
own rather than a `preexec_fn`: nothing runs between fork and exec in a launcher that has threads.
The kernel watches the *thread* that started the child: start children from one that lives as long as they should.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent_pid: int, command: list[str]) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # the parent died before the tether held
        sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
