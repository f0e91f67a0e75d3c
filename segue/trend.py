"""What a duration depends on, learned from measurements that grow old."""

from __future__ import annotations


class Trend:
    """y = base + slope * x by least squares, in which a measurement counts half after `half_life` further ones. Neither is ever
    negative: a duration has no negative parts.

    A single measurement counts as `most_times_expected` times what was expected at most: a process that was stopped for a while
    is not slow from then on, and one that stays slow is found out all the same. None where short and long ones alternate, as
    with the gaps between things that come in bursts: there the long ones are as true as the others.
    """

    def __init__(self, half_life: float = 50.0, most_times_expected: float | None = 3.0) -> None:
        self._keep = 0.5 ** (1 / half_life)
        self._most_times_expected = most_times_expected
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        if self._weight and self._most_times_expected is not None:
            base, slope = self.line()
            y = min(y, self._most_times_expected * max(base + slope * x, self.ratio * x))
        keep = self._keep
        self._weight = keep * self._weight + 1
        self._x = keep * self._x + x
        self._y = keep * self._y + y
        self._xx = keep * self._xx + x * x
        self._xy = keep * self._xy + x * y

    @property
    def ratio(self) -> float:
        """y for each x; 0 before any measurement."""
        return self._y / self._x if self._x else 0.0

    def line(self) -> tuple[float, float]:
        """(base, slope); (0, 0) before any measurement. With one x alone, all is base."""
        if not self._weight:
            return 0.0, 0.0
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x**2
        if spread <= 1e-9 * max(mean_x**2, 1.0):
            return mean_y, 0.0
        slope = max((self._xy / self._weight - mean_x * mean_y) / spread, 0.0)
        base = mean_y - slope * mean_x
        if base < 0:  # the line through the origin
            return 0.0, self._xy / self._xx
        return base, slope
