"""Where a sequence goes: asks the policy, charges its choice at once, and learns from what becomes of it.

A choice is charged before anything was sent, so that a burst spreads even before any worker has reported load.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from router.fleet import Columns
from router.policies import COLOCATED, DISAGGREGATED, POLICIES, Choice, Mask, Situation
from router.recent import RecentTransfers
from router.workers import WorkerLink, Workers
from segue.errors import ConfigError, InvalidRequest, NoWorker
from segue.trend import Trend

# Expected of an answer before any was seen, and what each one changes of that.
_FIRST_EXPECTED_TOKENS = 128.0
_LENGTH_WEIGHT = 0.05


@dataclass(frozen=True, slots=True)
class Wanted:
    """A sequence that is to be placed."""

    # The prompt, and what was generated before.
    token_ids: Sequence[int]
    # How many more there may be.
    max_tokens: int
    cache_salt: bytes = b""
    # Ids of workers that had part in a failed hand-over.
    suspects: Set[str] = frozenset()


class Placed:
    """Two workers, which may be one, that shall serve a sequence. Charged for as long as the `with` block runs."""

    def __init__(
        self, prefill: WorkerLink, decode: WorkerLink, choice: Choice, placement: Placement, *, num_queued: int, num_blocks: int
    ) -> None:
        self.prefill = prefill
        self.decode = decode
        self.reason = choice.reason
        self._num_queued = num_queued
        self._num_blocks = num_blocks
        self._placement = placement
        self._prefills = True
        self._is_reserved = False

    def __enter__(self) -> Self:
        self.prefill.charge(tokens=self._num_queued)
        self.decode.charge(sequences=1, unreserved=1, blocks=self._num_blocks)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end_prefill()
        self.reserved()
        self.decode.charge(sequences=-1, blocks=-self._num_blocks)

    def end_prefill(self) -> None:
        """The first token is out. Doing it twice does no harm."""
        if self._prefills:
            self._prefills = False
            self.prefill.charge(tokens=-self._num_queued)

    def reserved(self) -> None:
        """Decode has memory for it. Doing it twice does no harm."""
        if not self._is_reserved:
            self._is_reserved = True
            self.decode.charge(unreserved=-1)

    def handed_over(self, num_tokens: int, num_bytes: int, seconds: float) -> None:
        """Decode holds the KV cache, of which so many tokens were sent, so long after the first token."""
        if self.prefill is not self.decode:
            self._placement.learn_hand_over(self.prefill, self.decode, num_tokens, seconds)
            self._placement.transfers.add(self.prefill.record.worker_id, self.decode.record.worker_id, num_bytes)


class Placement:
    def __init__(self, workers: Workers, policy: str, *, may_join: bool, seed: int = 0) -> None:
        """Raises ConfigError for the name of no policy. Without `may_join` both phases run in one worker only where it is meant
        for both."""
        if policy not in POLICIES:
            raise ConfigError(f"policy: {policy!r} is not one of {', '.join(POLICIES)}")
        self._workers = workers
        self._policy = POLICIES[policy]
        self._may_join = may_join
        self._random = Random(seed)
        self._turn = 0
        self._is_split = True
        self._expected_tokens = _FIRST_EXPECTED_TOKENS
        # Milliseconds by tokens sent, within a host and between two.
        self._near, self._far = Trend(), Trend()
        self.transfers = RecentTransfers()

    def place(self, wanted: Wanted) -> Placed:
        """Raises NoWorker when a role is missing or no two workers fit together, InvalidRequest when it is too long."""
        columns = self._workers.fleet.columns
        cached = self._workers.fleet.cached_tokens(wanted.token_ids, wanted.cache_salt)
        self._turn += 1
        choices = [self._policy(situation) for situation in self._situations(columns, cached, wanted)]
        if not choices:
            raise InvalidRequest("max_tokens", "prompt and output exceed the KV memory of every worker")
        first = self._turn % len(choices)
        # Policies that predict no cost take layouts in turns.
        choice = min(choices[first:] + choices[:first], key=lambda choice: choice.cost_ms)
        if choice.reason != COLOCATED:
            self._is_split = choice.reason == DISAGGREGATED
        num_tokens, decode = len(wanted.token_ids), self._link(choice.decode)
        num_known = int(max(cached[choice.prefill], cached[choice.decode] if columns["pulls_kv"][choice.prefill] else 0))
        return Placed(
            self._link(choice.prefill),
            decode,
            choice,
            self,
            num_queued=max(num_tokens - num_known, 1),
            num_blocks=(num_tokens - int(cached[choice.decode])) // decode.record.block_size + 1,
        )

    def _situations(self, columns: Columns, cached: NDArray[np.int64], wanted: Wanted) -> Iterator[Situation]:
        """One for each KV layout that has workers for the sequence. Raises NoWorker."""
        num_tokens, draw = len(wanted.token_ids), self._random.random()
        prefills, decodes = columns["available"] & columns["prefills"], columns["available"] & columns["decodes"]
        of_layouts = [columns["layout"] == layout for layout in self._workers.fleet.layouts]
        paired = [here for here in of_layouts if (prefills & here).any() and (decodes & here).any()]
        if not paired:
            raise _no_worker(prefills, decodes)
        trusted = self._trusted(wanted.suspects)
        roomy_for_prompt = columns["capacity_tokens"] >= num_tokens
        roomy_for_all = columns["capacity_tokens"] >= num_tokens + wanted.max_tokens
        (near_ms, near_ms_per_token), (far_ms, far_ms_per_token) = self._near.line(), self._far.line()
        for here in paired:
            senders = _preferred(prefills & here & roomy_for_prompt, trusted)
            receivers = _preferred(decodes & here & roomy_for_all, trusted)
            # A colocated worker pairs with itself only.
            if (senders & receivers).any() or ((senders & ~decodes).any() and receivers.any()):
                yield Situation(
                    columns=columns,
                    prefills=senders & (receivers | ~decodes),
                    decodes=receivers,
                    roomy=roomy_for_all,
                    num_tokens=num_tokens,
                    expected_tokens=min(self._expected_tokens, wanted.max_tokens),
                    cached=cached,
                    hand_over_ms=min((ms for ms in (near_ms, far_ms) if ms > 0), default=0.0),
                    near_ms_per_token=near_ms_per_token,
                    far_ms_per_token=max(far_ms_per_token, near_ms_per_token),
                    may_join=self._may_join and _compute_alike(columns, here),
                    turn=self._turn,
                    draw=draw,
                    is_split=self._is_split,
                )

    def _trusted(self, suspects: Set[str]) -> Mask | None:
        """None when all are."""
        if not suspects:
            return None
        trusted = np.ones_like(self._workers.fleet.columns["available"])
        trusted[[link.row for link in self._workers.available() if link.record.worker_id in suspects]] = False
        return trusted

    def learn_hand_over(self, prefill: WorkerLink, decode: WorkerLink, num_tokens: int, seconds: float) -> None:
        trend = self._near if prefill.record.host == decode.record.host else self._far
        trend.add(num_tokens, 1000 * seconds)

    def learn_length(self, num_tokens: int) -> None:
        """An answer had so many tokens."""
        self._expected_tokens += _LENGTH_WEIGHT * (num_tokens - self._expected_tokens)

    def _link(self, row: int) -> WorkerLink:
        link = self._workers.fleet.member(row)
        assert isinstance(link, WorkerLink)
        return link


def _no_worker(prefills: Mask, decodes: Mask) -> NoWorker:
    missing = [role for role, candidates in (("prefill", prefills), ("decode", decodes)) if not candidates.any()]
    return NoWorker(
        f"no {' and no '.join(missing)} worker is ready" if missing else "no prefill and decode worker fit together"
    )


def _preferred(candidates: Mask, trusted: Mask | None) -> Mask:
    """Those that are trusted; all, if none is."""
    if trusted is None:
        return candidates
    preferred = candidates & trusted
    return preferred if preferred.any() else candidates


def _compute_alike(columns: Columns, here: Mask) -> bool:
    """Whether it does not matter, bit for bit, which of the available workers computes a prompt. 0 stands for formats that a
    worker did not tell."""
    formats = columns["formats"][here & columns["available"]]
    return bool(formats[0] != 0 and (formats == formats[0]).all())
