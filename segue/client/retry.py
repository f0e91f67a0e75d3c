"""When a call is made again: only when that can help, and so that nothing of its answer is given out twice.

The deadline covers all attempts and the pauses between them. Deciding only; the transports call and sleep.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from segue.client.failures import Failure
from segue.errors import DeadlineExceeded, SegueError


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Pauses double from `initial_pause_s` to `max_pause_s`, each shortened at random by up to half. So many attempts in a row
    may fail: one that gave output begins the count anew. Without `resume` a stream that breaks after that has failed."""

    max_attempts: int = 3
    resume: bool = True
    initial_pause_s: float = 0.1
    max_pause_s: float = 2.0

    def pause_s(self, attempt: int, draw: float) -> float:
        """The pause after failed attempt number `attempt`, from 1; `draw` is in [0, 1)."""
        full_s = min(self.max_pause_s, self.initial_pause_s * 2.0 ** (attempt - 1))
        return full_s * (1 - draw / 2)


class Attempts:
    """The attempts of one call."""

    def __init__(
        self,
        policy: RetryPolicy,
        timeout_s: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._policy = policy
        self._clock = clock
        self._draw = draw
        self._deadline_s = None if timeout_s is None else clock() + timeout_s
        self._num_begun = 0
        self._output_began = False

    def begin(self) -> float | None:
        """Counts an attempt and gives the seconds it may take, None for no limit. Raises DeadlineExceeded when none is left."""
        self._num_begun += 1
        left_s = self._left_s()
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded("the time allowed for the call is over")
        return left_s

    def output_came(self) -> None:
        """Part of the answer went to the caller."""
        self._output_began = True
        if self._policy.max_attempts > 1:
            self._num_begun = 1

    def pause_s(self, failure: Failure) -> float:
        """Seconds to wait before the next attempt. Raises the failure's error when there shall be none."""
        is_final = self._output_began and not self._policy.resume
        if is_final or not failure.may_retry or self._num_begun >= self._policy.max_attempts:
            raise failure.error
        pause_s = max(self._policy.pause_s(self._num_begun, self._draw()), failure.error.retry_after_s or 0.0)
        left_s = self._left_s()
        if left_s is not None and pause_s >= left_s:
            raise failure.error
        return pause_s

    def _left_s(self) -> float | None:
        return None if self._deadline_s is None else self._deadline_s - self._clock()


class ReadinessWait:
    """Paces the questions of `wait_ready`."""

    PAUSE_S = 0.1

    def __init__(self, timeout_s: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deadline_s = None if timeout_s is None else clock() + timeout_s

    def pause_s(self, problem: SegueError) -> float:
        """Seconds to wait before asking again. Raises `problem` when the time is over."""
        if self._deadline_s is not None and self._clock() >= self._deadline_s:
            raise problem
        return self.PAUSE_S
