"""Where the time of each attempt went, on a virtual clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.sequence import FailedAttempt, SequencePath
from router.timeline import AttemptTiming, attempt_timings
from segue.errors import WorkerLost
from segue.lifecycle import TRANSITIONS, Lifecycle, Phase

Q, R, P, T, D, F = Phase.QUEUED, Phase.RESERVED, Phase.PREFILLING, Phase.TRANSFERRING, Phase.DECODING, Phase.FINISHED


def test_a_whole_attempt() -> None:
    history = [(Q, 10.0), (R, 11.0), (P, 11.5), (T, 13.0), (D, 13.25), (F, 17.25)]
    assert attempt_timings(history, 99.0) == [AttemptTiming(0.0, 1.0, 0.5, 2.0, 0.25, 4.0)]


def test_a_failed_attempt_ends_where_the_next_begins() -> None:
    history = [(Q, 0.0), (R, 1.0), (P, 2.0), (Q, 5.0), (R, 6.0), (T, 8.0), (D, 9.0), (F, 10.0)]
    assert attempt_timings(history, 99.0) == [
        AttemptTiming(0.0, 1.0, 1.0, 4.0, 0.0, 0.0),
        # The ticket came after the first token: the wait for it is part of the transfer.
        AttemptTiming(5.0, 1.0, 0.0, 2.0, 1.0, 1.0),
    ]


def test_what_still_runs_lasts_until_now() -> None:
    assert attempt_timings([(Q, 1.0)], 4.0) == [AttemptTiming(0.0, 3.0, 0.0, 0.0, 0.0, 0.0)]
    assert attempt_timings([(Q, 1.0), (R, 2.0)], 4.0) == [AttemptTiming(0.0, 1.0, 0.0, 2.0, 0.0, 0.0)]
    assert attempt_timings([(Q, 1.0), (R, 2.0), (Q, 3.0)], 4.0)[1] == AttemptTiming(2.0, 1.0, 0.0, 0.0, 0.0, 0.0)


@given(st.data(), st.integers(1, 30))
def test_the_stretches_of_all_attempts_fill_the_time(data: st.DataObject, num_steps: int) -> None:
    now = [0.0]
    lifecycle = Lifecycle(clock=lambda: now[0])
    for _ in range(num_steps):
        if lifecycle.is_over:
            break
        now[0] += data.draw(st.integers(0, 8)) / 4
        lifecycle.enter(data.draw(st.sampled_from(sorted(TRANSITIONS[lifecycle.phase], key=str))))
    if not lifecycle.is_over:
        now[0] += 1.0
    timings = attempt_timings(lifecycle.history, now[0])
    assert len(timings) == sum(phase is Q for phase, _ in lifecycle.history)
    # Prefill lasts from being sent out to the first token; reserve runs beside it.
    ends = [t.start_s + t.queue_s + t.prefill_s + t.exposed_s + t.decode_s for t in timings]
    assert ends == [*(timing.start_s for timing in timings[1:]), now[0]]
    assert all(0 <= timing.reserve_s <= timing.prefill_s for timing in timings)


def test_a_path_tells_each_attempt_and_its_failure() -> None:
    now = [0.0]
    path = SequencePath(Lifecycle(clock=lambda: now[0]), "prefill-1", "decode-1")
    for phase in (R, Q, R, T, D, F):
        now[0] += 1
        path.lifecycle.enter(phase)
    path.failed_attempts.append(FailedAttempt("prefill-0", "decode-0", WorkerLost("gone")))
    path.transfer_hidden_s, path.prefill_queue_s, path.placement = 0.5, 0.25, "short_prompt"
    said = path.to_pb(request_begun_s=-2.0)
    first, last = said.timeline
    assert (said.start_s, said.placement, said.attempts) == (2.0, "short_prompt", 2)
    assert (first.prefill_worker, first.decode_worker, first.error_code, first.error) == (
        *("prefill-0", "decode-0"),
        *("worker_lost", "gone"),
    )
    assert (last.prefill_worker, last.start_s, last.prefill_s, last.error_code) == ("prefill-1", 2.0, 1.0, "")
    assert (last.transfer_hidden_s, last.prefill_queue_s) == (0.5, 0.25)
