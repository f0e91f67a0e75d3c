from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from bench.aborts import REQUEST_LIMIT_S, Held, Outcomes, Result, rows
from segue.client import ClusterStatus, WorkerLoad, WorkerStatus


def worker(**load: int) -> WorkerStatus:
    counts = {name: load.get(name, 0) for name in WorkerLoad.__dataclass_fields__}
    return WorkerStatus("decode-0", 1, ("decode",), "ready", "127.0.0.1:1", 1, "host", WorkerLoad(**counts))


def status(*workers: WorkerStatus, active_requests: int = 0) -> ClusterStatus:
    return ClusterStatus("tiny", workers, active_requests, True, "0")


@pytest.mark.parametrize(
    ("now", "held"),
    [
        (status(worker(total_blocks=9, free_blocks=5, cached_blocks=4)), Held(0, 0, 0)),
        (status(worker(total_blocks=9, free_blocks=5, cached_blocks=3, leased_blocks=1)), Held(1, 0, 0)),
        (status(worker(total_blocks=9, free_blocks=5, cached_blocks=2)), Held(2, 0, 0)),
        (status(worker(waiting_requests=1), worker(running_requests=2), active_requests=4), Held(0, 7, 0)),
        (status(worker(open_tickets=1), worker(open_tickets=2)), Held(0, 0, 3)),
    ],
)
def test_what_is_held_is_counted_wherever_it_is(now: ClusterStatus, held: Held) -> None:
    assert Held.by(now) == held


CLEAN = Result("shm", Outcomes(num_left=100, num_answered=30), Outcomes(num_answered=60), Held(0, 0, 0), 0.9)


@pytest.mark.parametrize(
    "spoilt",
    [
        replace(CLEAN, held=Held(1, 0, 0)),
        replace(CLEAN, held=Held(0, 1, 0)),
        replace(CLEAN, held=Held(0, 0, 1)),
        replace(CLEAN, aborts=Outcomes(num_wrong=1)),
        replace(CLEAN, full=Outcomes(num_wrong=1)),
        replace(CLEAN, aborts=Outcomes(errors=Counter(worker_lost=1))),
        replace(CLEAN, full=Outcomes(errors=Counter(deadline_exceeded=1))),
        replace(CLEAN, full=Outcomes(slowest_s=REQUEST_LIMIT_S + 1)),
    ],
)
def test_any_stain_shows(spoilt: Result) -> None:
    assert CLEAN.is_clean
    assert not spoilt.is_clean


def test_the_worst_transport_counts() -> None:
    other = replace(CLEAN, transport="tcp", held=Held(3, 2, 1), occupancy=0.8, aborts=Outcomes(num_left=90, num_answered=40))
    values = {row.metric: row.value for row in rows([CLEAN, other])}
    assert (values["aborts"], values["aborts_answered"], values["full_cache_occupancy"]) == (90, 30, 0.8)
    leaked = [values[f"aborts_leaked_{what}"] for what in ("blocks", "sequences", "tickets")]
    assert leaked == [3, 2, 1]
    assert {len(row.runs) for row in rows([CLEAN, other])} == {2}
