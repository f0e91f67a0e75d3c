"""`python -I -S sweeper.py PID FOLDER`: waits until process PID ends, kills what is left of its session, removes FOLDER.

Ray's helpers notice late that Ray is gone, so whoever owns Ray leads a session of its own, and this program, which leads
another, watches it. It outlives a launcher that is killed, and is the last of a cluster to leave.
"""

import os
import select
import shutil
import signal
import sys
import time
from contextlib import suppress

_PAUSE_S = 0.02
_LIMIT_S = 10.0


def main(leader_pid: int, folder: str) -> None:
    wait_for_end(leader_pid)
    deadline_s = time.monotonic() + _LIMIT_S
    while (pids := session_members(leader_pid)) and time.monotonic() < deadline_s:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE_S)
    shutil.rmtree(folder, ignore_errors=True)


def wait_for_end(pid: int) -> None:
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        select.select([descriptor], [], [])
        os.close(descriptor)


def session_members(leader_pid: int) -> list[int]:
    """Processes of the session that `leader_pid` leads or led; its number is not given away while it has members."""
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError), open(f"/proc/{entry}/stat") as stat:
                # After the name, in parentheses: state, parent, process group, session.
                state, _, _, session = stat.read().rpartition(")")[2].split()[:4]
                if int(session) == leader_pid and state != "Z":
                    members.append(int(entry))
    return members


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
