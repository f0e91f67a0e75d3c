"""A replica's process writes to its own log and says how its run ended."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.launch import Programs
from deploy.replica import num_starts, worker_log
from segue.config import WorkerSettings

# A process of its own: a replica takes its output over for good.
RUN = """
import json, os, sys
from deploy.replica import Replica
saved = os.dup(1)
outcome = Replica(sys.argv[1], False).run(sys.argv[2])
os.write(saved, json.dumps([outcome, os.environ["OMP_NUM_THREADS"]]).encode())
"""


def test_a_refusal_is_an_outcome_not_an_exception(stub_programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_STUB_WORKER", "refuse")
    worker = WorkerSettings(
        cluster_id="c", redis="r", worker_id="decode-0", roles=("decode",), model_dir=Path("/m"), model_name="m", threads=3
    )
    log = worker_log("c", "decode-0")
    assert num_starts(log) == 0
    for starts in (1, 2):
        command = [sys.executable, "-c", RUN, worker.model_dump_json(), stub_programs.worker]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        outcome, threads = json.loads(result.stdout)
        assert outcome == {"drained": False, "again": True, "code": "config", "error": "kv_memory: too small for the stub"}
        assert threads == "3"
        assert result.stderr == ""  # it went to the log
        assert num_starts(log) == starts
    assert log.read_text().count("kv_memory: too small for the stub") == 2
