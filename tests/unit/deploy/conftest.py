"""Stand-ins for router and worker, and a look at which processes are left."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.launch import Programs

STUBS = Path(__file__).parent / "stubs"


@pytest.fixture
def segue_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Logs and models of this test alone."""
    monkeypatch.setenv("SEGUE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def stub_programs(segue_home: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """A router and workers without model or engine; all the rest is real."""
    monkeypatch.setenv("PYTHONPATH", str(STUBS))
    return Programs(router=(sys.executable, "-m", "stub_router"), worker="stub_worker:run_worker")


@pytest.fixture
def children() -> Callable[[], set[int]]:
    """The processes that descend from this one and were not there when the test began."""
    before = descendants(os.getpid())
    return lambda: descendants(os.getpid()) - before


def descendants(root: int) -> set[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if state != "Z":
                parents[int(entry.name)] = int(parent)
    found: set[int] = set()
    frontier = {root}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier}
        found |= frontier
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
