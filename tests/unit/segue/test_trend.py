import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.trend import Trend

numbers = st.floats(0.01, 1000)


@given(numbers, numbers, st.lists(st.integers(1, 500), min_size=2, max_size=40, unique=True))
def test_it_finds_a_line(base: float, slope: float, xs: list[int]) -> None:
    trend = Trend()
    for x in xs:
        trend.add(x, base + slope * x)
    found_base, found_slope = trend.line()
    for x in (min(xs), max(xs)):
        assert found_base + found_slope * x == pytest.approx(base + slope * x, rel=1e-3)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=30))
def test_no_part_is_ever_negative(points: list[tuple[float, float]]) -> None:
    trend = Trend()
    for x, y in points:
        trend.add(x, y)
    assert min(trend.line()) >= 0
    assert trend.ratio > 0


def test_old_measurements_fade() -> None:
    trend = Trend(half_life=5)
    for y in [100.0] * 50 + [10.0] * 50:
        trend.add(1, y)
    assert trend.line() == (pytest.approx(10.0, abs=0.2), 0.0)


def test_nothing_is_known_of_nothing() -> None:
    assert (Trend().line(), Trend().ratio) == ((0.0, 0.0), 0.0)


def test_one_that_was_stopped_is_not_slow_from_then_on() -> None:
    trend = Trend()
    for y in [10.0] * 100 + [5000.0]:
        trend.add(1, y)
    assert trend.line()[0] < 11
    for _ in range(500):
        trend.add(1, 5000.0)
    assert trend.line()[0] > 3000, "what stays slow is"


def test_bursts_are_measured_as_they_are() -> None:
    """Nineteen gaps of nothing and a long one: what counts as three times the expected at most never adds up."""
    bursts = ([0.0] * 19 + [1.0]) * 20
    whole, capped = Trend(most_times_expected=None), Trend()
    for y in bursts:
        whole.add(100, y)
        capped.add(100, y)
    assert whole.ratio == pytest.approx(1 / 2000, rel=0.2)
    assert capped.ratio < whole.ratio / 10
