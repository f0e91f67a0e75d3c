"""The committed stubs are those that proto/ generates."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_committed_stubs_are_what_proto_generates(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHON": sys.executable}
    subprocess.run([str(ROOT / "proto/generate.sh"), str(tmp_path)], env=env, check=True)
    generated = {path.name: path.read_text() for path in (tmp_path / "segue/v1").iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "segue/v1").glob("*_pb2*")}
    stale = sorted(name for name in generated.keys() | committed.keys() if generated.get(name) != committed.get(name))
    assert not stale, f"run make proto: {stale} differ from what proto/ generates"
    assert generated
