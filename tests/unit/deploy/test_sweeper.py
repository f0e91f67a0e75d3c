"""What is left of a session is killed when its leader ends, and its folder removed."""

import os
import subprocess
import sys
from pathlib import Path

from deploy import sweeper

# A leader that leaves a child of its session behind, in another process group, and ends when told to.
LEADER = (
    "import subprocess, sys\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], process_group=0)\n"
    "print(child.pid, flush=True)\n"
    "sys.stdin.read()\n"
)


def test_orphans_of_the_session_are_killed_and_the_folder_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    (folder / "session").mkdir(parents=True)
    leader = subprocess.Popen(
        [sys.executable, "-c", LEADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert leader.stdin is not None
    assert leader.stdout is not None
    with leader.stdout:
        orphan = int(leader.stdout.readline())
    assert set(sweeper.session_members(leader.pid)) == {leader.pid, orphan}
    sweep = subprocess.Popen(
        [sys.executable, "-I", "-S", sweeper.__file__, str(leader.pid), str(folder)], start_new_session=True
    )
    os.kill(orphan, 0)  # nothing happens while the leader lives
    assert folder.is_dir()
    leader.stdin.close()
    leader.wait()
    assert sweep.wait(timeout=60) == 0
    assert sweeper.session_members(leader.pid) == []
    assert not folder.exists()


def test_a_leader_that_is_gone_already_is_no_reason_to_wait(tmp_path: Path) -> None:
    leader = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    leader.wait()
    sweeper.main(leader.pid, str(tmp_path / "folder"))
    assert sweeper.session_members(leader.pid) == []
