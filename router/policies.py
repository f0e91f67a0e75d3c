"""Which of the candidates serves a sequence: small pure functions over columns of numbers, chosen by name.

To add one: write a function from a Situation to a Choice, and name it in POLICIES. A row is a worker; `prefills` and `decodes`
mark the rows that may take either side. What happened before is in the situation (`turn`, `draw`, `is_split`), never in the
policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from router.fleet import Columns

Mask = NDArray[np.bool_]
Milliseconds = NDArray[np.float64]

# Until something was measured, on any worker.
DEFAULT_PREFILL_MS_PER_TOKEN = 1.0
DEFAULT_DECODE_MS_PER_STEP = 10.0
DEFAULT_DECODE_MS_PER_SEQUENCE = 1.0
# By so much must the other way, on two workers or on one, be better: two that cost the same do not alternate.
HYSTERESIS_MS = 1.0

# A prompt that takes longer is never computed on a decode worker: who decodes there, now or a moment later, would see a pause.
MAX_STALL_MS = 100.0

# Why a sequence goes the way it does. Stable words: they are in paths and metrics.
DISAGGREGATED = "disaggregated"
COLOCATED = "colocated"
SHORT_PROMPT = "short_prompt"
CACHED_ON_DECODE = "cached_on_decode"
DECODE_FULL = "decode_full"


@dataclass(frozen=True)
class Situation:
    """One sequence and the workers of one layout that could serve it. The properties are the terms of its cost, by row."""

    columns: Columns
    # Candidates for either side; those in both are colocated workers, which pair with themselves.
    prefills: Mask
    decodes: Mask
    # Rows whose memory holds the prompt and the longest answer.
    roomy: Mask
    # Prompt, and what was generated before.
    num_tokens: int
    # How many more are expected.
    expected_tokens: float
    # By row: leading tokens whose KV is there.
    cached: NDArray[np.int64]
    # Milliseconds between a prompt's last step and its receipt: for any hand-over, and for each token sent to the same and to
    # another host, which takes no less.
    hand_over_ms: float = 0.0
    near_ms_per_token: float = 0.0
    far_ms_per_token: float = 0.0
    # Whether both phases may run in one worker that is not meant for both: formats are equal, and it is not forbidden.
    may_join: bool = False
    # How many placements there were, a random number in [0, 1), and whether the last one was on two workers.
    turn: int = 0
    draw: float = 0.0
    is_split: bool = True

    @cached_property
    def prompt_ms(self) -> Milliseconds:
        """To compute what is not cached. The last token always is computed: its logits are what the prompt is computed for."""
        return np.maximum(self.num_tokens - self.cached, 1) * self.prefill_ms_per_token

    @cached_property
    def first_token_ms(self) -> Milliseconds:
        """Until the first token: what is ahead, and the prompt."""
        return self.queue_ms + self.prompt_ms

    @cached_property
    def queue_ms(self) -> Milliseconds:
        ahead: Milliseconds = self.columns["queued_tokens"] * self.prefill_ms_per_token
        return ahead

    def fetched_tokens(self, num_on_decode: int) -> NDArray[np.int64]:
        """Whose KV need not be computed, should the decode worker have that of so many."""
        num_fetchable = min(num_on_decode, self.num_tokens - 1)
        return np.where(self.columns["pulls_kv"], np.maximum(num_fetchable - self.cached, 0), 0)

    @cached_property
    def moved_tokens(self) -> NDArray[np.int64]:
        """Whose KV is sent, should the row decode."""
        return np.maximum(self.num_tokens - self.cached, 0)

    @cached_property
    def decode_ms(self) -> Milliseconds:
        """Of all steps, and of what this sequence adds to the steps of those that run already; and waiting for memory."""
        columns = self.columns
        per_step = _measured(columns, "decode_ms_per_step", DEFAULT_DECODE_MS_PER_STEP)
        per_sequence = _measured(columns, "decode_ms_per_sequence", DEFAULT_DECODE_MS_PER_SEQUENCE)
        running = columns["sequences"]
        own = per_step + per_sequence * (running + 1)
        # Others have to end first, which takes as long as they take.
        total: Milliseconds = self.expected_tokens * (own * (1 + self.lacks_memory) + per_sequence * running)
        return total

    @cached_property
    def lacks_memory(self) -> Mask:
        """Where the prompt does not fit into what is not leased now."""
        lacks: Mask = self.moved_tokens >= self.columns["available_blocks"] * self.columns["block_size"]
        return lacks

    @cached_property
    def prefill_ms_per_token(self) -> Milliseconds:
        return prefill_ms_per_token(self.columns)


def prefill_ms_per_token(columns: Columns) -> Milliseconds:
    return _measured(columns, "prefill_ms_per_token", DEFAULT_PREFILL_MS_PER_TOKEN)


def _measured(columns: Columns, name: str, default: float) -> Milliseconds:
    """A worker that has measured nothing is taken to be like the others; nothing is said of rows that nobody has."""
    column: Milliseconds = columns[name]
    num_known = np.count_nonzero(column)
    if num_known == np.count_nonzero(columns["block_size"]):
        return column
    return np.where(column, column, column.sum() / num_known if num_known else default)


@dataclass(frozen=True, slots=True)
class Choice:
    prefill: int
    decode: int
    reason: str
    # Predicted for this sequence and, by it, for those that its workers have.
    cost_ms: float = 0.0


Policy = Callable[[Situation], Choice]


def cost(situation: Situation) -> Choice:
    """The least milliseconds, for this sequence and those that it delays: docs/routing.md has the terms."""
    split, joined = _best_split(situation), _best_joined(situation)
    if split is None or joined is None:
        choice = split or joined
        assert choice is not None
        return choice
    usual, other = (split, joined) if situation.is_split else (joined, split)
    return other if other.cost_ms < usual.cost_ms - HYSTERESIS_MS else usual


def least_loaded(situation: Situation) -> Choice:
    """The prefill worker with the fewest tokens ahead, the decode worker with the fewest sequences, then most free memory."""
    columns = situation.columns
    queued = np.where(situation.prefills, columns["queued_tokens"], np.iinfo(np.int64).max)
    prefill = int(np.argmin(queued))
    if situation.decodes[prefill]:
        return Choice(prefill, prefill, COLOCATED)
    decodes = np.flatnonzero(situation.decodes)
    order = np.lexsort((-columns["available_blocks"][decodes], columns["sequences"][decodes]))
    return Choice(prefill, int(decodes[order[0]]), DISAGGREGATED)


def round_robin(situation: Situation) -> Choice:
    return _pair_at(situation, situation.turn, situation.turn)


def at_random(situation: Situation) -> Choice:
    num_prefills = int(np.count_nonzero(situation.prefills))
    number = int(situation.draw * num_prefills * int(np.count_nonzero(situation.decodes)))
    return _pair_at(situation, number % num_prefills, number // num_prefills)


POLICIES: dict[str, Policy] = {
    "cost": cost,
    "least_loaded": least_loaded,
    "round_robin": round_robin,
    "random": at_random,
}


def _pair_at(situation: Situation, prefill_number: int, decode_number: int) -> Choice:
    prefills, decodes = np.flatnonzero(situation.prefills), np.flatnonzero(situation.decodes)
    prefill = int(prefills[prefill_number % len(prefills)])
    if situation.decodes[prefill]:
        return Choice(prefill, prefill, COLOCATED)
    return Choice(prefill, int(decodes[decode_number % len(decodes)]), DISAGGREGATED)


def _best_split(situation: Situation) -> Choice | None:
    """On two workers. What a decode worker has of the prompt, prefill fetches from there: decode workers that have equally much
    are looked at together, first all of them as if they had nothing, then those with which it could still be better."""
    senders = situation.prefills & ~situation.decodes
    if not senders.any() or not situation.decodes.any():
        return None
    first_ms = np.where(senders, situation.first_token_ms + situation.hand_over_ms, np.inf)
    best = _best_pair(situation, first_ms, first_ms, situation.decodes)
    fetching = senders & situation.columns["pulls_kv"]
    knowing = situation.decodes & (situation.cached > np.where(fetching, situation.cached, situation.num_tokens).min())
    decodes = np.flatnonzero(knowing)
    known = situation.cached[decodes]
    bounds = _least_ms(situation, senders, decodes)
    while len(bounds) and bounds.min() < best.cost_ms:
        num_known = int(known[np.argmin(bounds)])
        fetched, per_token = situation.fetched_tokens(num_known), situation.prefill_ms_per_token
        pair = _best_pair(
            situation,
            first_ms - fetched * np.maximum(per_token - situation.near_ms_per_token, 0),
            first_ms - fetched * np.maximum(per_token - situation.far_ms_per_token, 0),
            knowing & (situation.cached == num_known),
        )
        best = min(best, pair, key=lambda choice: choice.cost_ms)
        bounds[known == num_known] = np.inf
    return best


def _least_ms(situation: Situation, senders: Mask, decodes: NDArray[np.intp]) -> Milliseconds:
    """For each of the rows `decodes`: no pair with it costs less."""
    unknown = situation.num_tokens - situation.cached[decodes]
    prompt_ms = np.maximum(unknown, 1) * np.where(senders, situation.prefill_ms_per_token, np.inf).min()
    ahead_ms = np.where(senders, situation.queue_ms, np.inf).min() + situation.hand_over_ms
    least: Milliseconds = ahead_ms + prompt_ms + unknown * situation.near_ms_per_token + situation.decode_ms[decodes]
    return least


def _best_pair(situation: Situation, near_first_ms: Milliseconds, far_first_ms: Milliseconds, decodes: Mask) -> Choice:
    """Those on one host and on two are looked at apart: then the cost is a sum of two columns, and the best of each gives the
    best pair. `near_first_ms` and `far_first_ms` are until the first token, by row; infinite where it does not prefill."""
    decode_ms = np.where(decodes, situation.decode_ms, np.inf)
    near_second_ms = decode_ms + situation.moved_tokens * situation.near_ms_per_token
    far_second_ms = decode_ms + situation.moved_tokens * situation.far_ms_per_token
    prefill, decode = int(np.argmin(far_first_ms)), int(np.argmin(far_second_ms))
    cost_ms = float(far_first_ms[prefill] + far_second_ms[decode])
    hosts = situation.columns["host"]
    num_hosts = int(hosts.max()) + 1
    first_of_host, second_of_host = np.full(num_hosts, np.inf), np.full(num_hosts, np.inf)
    np.minimum.at(first_of_host, hosts, near_first_ms)
    np.minimum.at(second_of_host, hosts, near_second_ms)
    host = int(np.argmin(first_of_host + second_of_host))
    near_cost_ms = float(first_of_host[host] + second_of_host[host])
    if near_cost_ms <= cost_ms:
        here = hosts == host
        prefill = int(np.argmin(np.where(here, near_first_ms, np.inf)))
        decode = int(np.argmin(np.where(here, near_second_ms, np.inf)))
        cost_ms = near_cost_ms
    return Choice(prefill, decode, DISAGGREGATED, cost_ms)


def _best_joined(situation: Situation) -> Choice | None:
    """Both phases on one worker: a colocated one; a decode worker, if the prompt is short, and its sequences wait; or, when no
    decode worker has memory, a prefill worker that has nothing else to do."""
    columns = situation.columns
    colocated = situation.prefills & situation.decodes
    candidates = colocated
    decode_is_full = False
    if situation.may_join:
        decode_is_full = bool(np.all(situation.lacks_memory[situation.decodes]))
        if decode_is_full:
            candidates = candidates | (situation.prefills & situation.roomy & (columns["queued_tokens"] == 0))
        else:
            candidates = candidates | (situation.decodes & (situation.prompt_ms <= MAX_STALL_MS))
    if not candidates.any():
        return None
    total = situation.first_token_ms + columns["sequences"] * situation.prompt_ms + situation.decode_ms
    row = int(np.argmin(np.where(candidates, total, np.inf)))
    if colocated[row]:
        reason = COLOCATED
    elif decode_is_full:
        reason = DECODE_FULL
    else:
        reason = CACHED_ON_DECODE if 2 * situation.cached[row] >= situation.num_tokens else SHORT_PROMPT
    return Choice(row, row, reason, float(total[row]))
