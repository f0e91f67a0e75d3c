from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segue.client.failures import Failure
from segue.client.retry import Attempts, ReadinessWait, RetryPolicy
from segue.errors import DeadlineExceeded, NoWorker, Unreachable

LOST = Failure(Unreachable("gone"), may_retry=True)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@given(attempt=st.integers(1, 60), draw=st.floats(0, 1, exclude_max=True))
@settings(max_examples=50)
def test_pauses_stay_between_half_and_the_whole(attempt: int, draw: float) -> None:
    policy = RetryPolicy(initial_pause_s=0.1, max_pause_s=2.0)
    whole_s = min(2.0, 0.1 * 2 ** (attempt - 1))
    assert whole_s / 2 <= policy.pause_s(attempt, draw) <= whole_s


def test_pauses_double_and_attempts_end() -> None:
    attempts = Attempts(RetryPolicy(max_attempts=4), None, draw=lambda: 0.0)
    pauses_s = []
    for _ in range(3):
        assert attempts.begin() is None
        pauses_s.append(attempts.pause_s(LOST))
    assert pauses_s == [0.1, 0.2, 0.4]
    attempts.begin()
    with pytest.raises(Unreachable):
        attempts.pause_s(LOST)


def test_each_attempt_gets_what_the_deadline_leaves() -> None:
    clock = Clock()
    attempts = Attempts(RetryPolicy(), 10.0, clock=clock, draw=lambda: 0.0)
    assert attempts.begin() == 10.0
    clock.now_s += 4
    assert attempts.pause_s(LOST) == 0.1
    assert attempts.begin() == 6.0


def test_a_pause_that_would_pass_the_deadline_is_not_taken() -> None:
    clock = Clock()
    attempts = Attempts(RetryPolicy(), 1.0, clock=clock, draw=lambda: 0.0)
    attempts.begin()
    clock.now_s += 0.95
    with pytest.raises(Unreachable):
        attempts.pause_s(LOST)
    clock.now_s += 0.05
    with pytest.raises(DeadlineExceeded):
        attempts.begin()


@pytest.mark.parametrize("resume", [True, False])
def test_final_failures_and_begun_output_end_the_call(resume: bool) -> None:
    attempts = Attempts(RetryPolicy(max_attempts=2, resume=resume), None)
    attempts.begin()
    with pytest.raises(NoWorker):
        attempts.pause_s(Failure(NoWorker("none"), may_retry=False))
    assert attempts.pause_s(LOST) > 0
    attempts.begin()
    attempts.output_came()
    if resume:
        assert attempts.pause_s(LOST) > 0, "it got on: the count begins anew"
        attempts.begin()
    with pytest.raises(Unreachable):
        attempts.pause_s(LOST)


def test_one_attempt_is_one_attempt() -> None:
    attempts = Attempts(RetryPolicy(max_attempts=1), None)
    attempts.begin()
    attempts.output_came()
    with pytest.raises(Unreachable):
        attempts.pause_s(LOST)


def test_readiness_is_asked_for_until_the_time_is_over() -> None:
    clock = Clock()
    wait = ReadinessWait(1.0, clock=clock)
    assert wait.pause_s(NoWorker("decode")) > 0
    clock.now_s += 1
    with pytest.raises(NoWorker):
        wait.pause_s(NoWorker("decode"))
    assert ReadinessWait(None, clock=clock).pause_s(NoWorker("decode")) > 0
