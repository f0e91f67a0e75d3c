"""What is measured lately: percentiles, rates, and that all of it is forgotten."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fake import FakeSequenceServer
from router.generation import ChoiceOutput
from router.metrics import Metrics
from router.recent import RecentLatency, RecentTransfers
from segue.sampling import GeneratedToken


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@given(st.lists(st.tuples(st.floats(1e-5, 1e3), st.integers(1, 5)), min_size=1, max_size=60))
def test_percentiles_are_those_of_the_durations_to_within_a_fortieth(measured: list[tuple[float, int]]) -> None:
    latency = RecentLatency(Clock())
    for seconds, times in measured:
        latency.add(seconds, times)
    durations = sorted(seconds for seconds, times in measured for _ in range(times))
    found = latency.to_pb()
    assert found.count == len(durations)
    for percentile_s, share in ((found.p50_s, 0.5), (found.p99_s, 0.99)):
        exact_s = durations[math.ceil(share * len(durations)) - 1]
        assert percentile_s == pytest.approx(exact_s, rel=0.0251)
    (point,) = found.points
    assert (point.count, point.p50_s, point.p99_s) == (found.count, found.p50_s, found.p99_s)


def test_points_stand_for_their_own_time_and_go_after_five_minutes() -> None:
    clock = Clock()
    latency = RecentLatency(clock)
    latency.add(1.0)
    clock.now_s += 21.0
    latency.add(2.0)
    latency.add(2.0)
    found = latency.to_pb()
    assert [(point.age_s, point.count) for point in found.points] == [(21.0, 1), (1.0, 2)]
    assert [round(point.p50_s) for point in found.points] == [1, 2]
    clock.now_s = 1299.0
    assert latency.to_pb().count == 3
    clock.now_s = 1300.0
    assert latency.to_pb().count == 2
    clock.now_s = 5000.0
    gone = latency.to_pb()
    assert (gone.count, gone.p50_s, gone.p99_s, list(gone.points)) == (0, 0.0, 0.0, [])


def test_no_more_is_kept_than_is_shown() -> None:
    clock = Clock()
    latency = RecentLatency(clock)
    for _ in range(1000):
        latency.add(0.0)
        clock.now_s += 5.0
    assert len(latency._slots._slots) == 60


def test_transfers_are_rates_of_each_pair_over_ten_seconds() -> None:
    clock = Clock()
    transfers = RecentTransfers(clock)
    for num_bytes in (1000, 500):
        transfers.add("prefill-0", "decode-1", num_bytes)
    transfers.add("prefill-0", "decode-0", 20)
    transfers.add("prefill-1", "decode-0", 0)
    found = [(rate.prefill_worker, rate.decode_worker, rate.bytes_per_s) for rate in transfers.to_pb()]
    assert found == [("prefill-0", "decode-0", 2.0), ("prefill-0", "decode-1", 150.0)]
    clock.now_s += 10.0
    assert transfers.to_pb() == []


def test_tokens_of_one_message_share_out_the_time_since_the_last() -> None:
    clock = Clock()
    metrics = Metrics(FakeSequenceServer(lambda _: []), clock)
    with metrics.track("chat") as meter:
        for num_tokens in (1, 3):
            clock.now_s += 0.3
            meter.see(ChoiceOutput(0, "", (GeneratedToken(5),) * num_tokens))
    ttft, gaps = metrics.recent_ttft.to_pb(), metrics.recent_inter_token.to_pb()
    assert (ttft.count, gaps.count) == (1, 3)
    assert (ttft.p50_s, gaps.p99_s) == (pytest.approx(0.3, rel=0.03), pytest.approx(0.1, rel=0.03))
