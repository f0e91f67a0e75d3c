"""The cost policy against one that looks at every pair, term by term; the others by what they are for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.fleet import Fleet, WorkerFacts
from router.policies import (
    CACHED_ON_DECODE,
    COLOCATED,
    DECODE_FULL,
    DISAGGREGATED,
    HYSTERESIS_MS,
    MAX_STALL_MS,
    POLICIES,
    SHORT_PROMPT,
    Choice,
    Situation,
    cost,
)

PREFILL = WorkerFacts(
    available=True,
    prefills=True,
    decodes=False,
    layout=1,
    formats=1,
    host=0,
    pulls_kv=False,
    block_size=16,
    capacity_tokens=10_000,
    queued_tokens=0,
    sequences=0,
    unreserved=0,
    available_blocks=1000,
    prefill_ms_per_token=1.0,
    decode_ms_per_step=10.0,
    decode_ms_per_sequence=1.0,
)
DECODE = PREFILL._replace(prefills=False, decodes=True)
BOTH = PREFILL._replace(decodes=True)


class Known:
    def __init__(self, facts: WorkerFacts) -> None:
        self._facts = facts

    def facts(self) -> WorkerFacts:
        return self._facts


def situation(workers: list[WorkerFacts], cached: list[int] | None = None, **values: object) -> Situation:
    fleet = Fleet()
    for worker in workers:
        fleet.join(Known(worker))
    columns = fleet.columns
    known = np.zeros_like(columns["capacity_tokens"])
    known[: len(cached or [])] = cached or []
    given_values = {
        "num_tokens": 100,
        "expected_tokens": 50.0,
        "cached": known,
        "roomy": columns["capacity_tokens"] > 0,
    } | values
    return Situation(columns=columns, prefills=columns["prefills"], decodes=columns["decodes"], **given_values)  # type: ignore[arg-type]


def naive(s: Situation) -> list[Choice]:
    """All that could be chosen."""

    def decode_ms(row: int) -> float:
        worker = {name: column[row] for name, column in s.columns.items()}
        own = worker["decode_ms_per_step"] + worker["decode_ms_per_sequence"] * (worker["sequences"] + 1)
        needed = (s.num_tokens - s.cached[row]) // worker["block_size"] + 1
        wait = own if needed > worker["available_blocks"] else 0
        return float(s.expected_tokens * (own + worker["decode_ms_per_sequence"] * worker["sequences"] + wait))

    def prompt_ms(row: int, num_fetched: int = 0) -> float:
        return float(max(s.num_tokens - s.cached[row] - num_fetched, 1) * s.columns["prefill_ms_per_token"][row])

    def first_token_ms(row: int, num_fetched: int = 0) -> float:
        return float(s.columns["queued_tokens"][row] * s.columns["prefill_ms_per_token"][row]) + prompt_ms(row, num_fetched)

    prefills, decodes = np.flatnonzero(s.prefills).tolist(), np.flatnonzero(s.decodes).tolist()
    found = []
    for p in prefills:
        for d in decodes:
            near = s.columns["host"][p] == s.columns["host"][d]
            per_token = s.near_ms_per_token if near else s.far_ms_per_token
            if p not in decodes:
                num_fetched = max(min(s.cached[d], s.num_tokens - 1) - s.cached[p], 0) if s.columns["pulls_kv"][p] else 0
                fetched_ms = num_fetched * min(per_token, s.columns["prefill_ms_per_token"][p])
                moved_ms = max(s.num_tokens - s.cached[d], 0) * per_token
                cost_ms = first_token_ms(p, num_fetched) + fetched_ms + s.hand_over_ms + moved_ms + decode_ms(d)
                found.append(Choice(p, d, DISAGGREGATED, cost_ms))
    full = all(
        (s.num_tokens - s.cached[d]) // s.columns["block_size"][d] + 1 > s.columns["available_blocks"][d] for d in decodes
    )
    for row in {*prefills, *decodes}:
        is_both = row in prefills and row in decodes
        is_idle = row in prefills and s.roomy[row] and s.columns["queued_tokens"][row] == 0
        is_short = row in decodes and prompt_ms(row) <= MAX_STALL_MS
        if is_both or (s.may_join and (is_idle if full else is_short)):
            delayed = s.columns["sequences"][row] * prompt_ms(row)
            found.append(Choice(row, row, "", first_token_ms(row) + delayed + decode_ms(row)))
    return found


workers = st.builds(
    WorkerFacts,
    available=st.just(True),
    prefills=st.booleans(),
    decodes=st.booleans(),
    layout=st.just(1),
    formats=st.just(1),
    host=st.integers(0, 2),
    pulls_kv=st.sampled_from([True, True, False]),
    block_size=st.sampled_from([8, 16]),
    capacity_tokens=st.sampled_from([0, 10_000, 10_000]),
    queued_tokens=st.sampled_from([0, 0, 50, 300]),
    sequences=st.integers(0, 20),
    unreserved=st.just(0),
    available_blocks=st.integers(0, 40),
    prefill_ms_per_token=st.floats(0.1, 5),
    decode_ms_per_step=st.floats(1, 50),
    decode_ms_per_sequence=st.floats(0.1, 5),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(workers, st.integers(0, 120)), min_size=1, max_size=8),
    st.integers(1, 200),
    st.sampled_from([0.1, 2.0, 50.0]),
    st.floats(0, 20),
    st.floats(0, 1),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
)
def test_the_least_cost_of_all_pairs(
    fleet: list[tuple[WorkerFacts, int]],
    num_tokens: int,
    expected_tokens: float,
    base: float,
    near: float,
    far: float,
    may_join: bool,
    is_split: bool,
) -> None:
    s = situation(
        [worker for worker, _ in fleet],
        [min(cached, num_tokens) for _, cached in fleet],
        num_tokens=num_tokens,
        expected_tokens=expected_tokens,
        hand_over_ms=base,
        near_ms_per_token=near,
        far_ms_per_token=near + far,
        may_join=may_join,
        is_split=is_split,
    )
    if not (possible := naive(s)):
        return
    chosen = cost(s)
    costs = {(choice.prefill, choice.decode): choice.cost_ms for choice in possible}
    assert costs[chosen.prefill, chosen.decode] == pytest.approx(chosen.cost_ms)
    split = min((c.cost_ms for c in possible if c.prefill != c.decode), default=np.inf)
    joined = min((c.cost_ms for c in possible if c.prefill == c.decode), default=np.inf)
    if min(split, joined) < max(split, joined) - 1.01 * HYSTERESIS_MS:
        assert chosen.cost_ms == pytest.approx(min(split, joined))
    elif abs(split - joined) < 0.99 * HYSTERESIS_MS:
        assert chosen.cost_ms == pytest.approx(split if is_split else joined), "it goes on as before"


@pytest.mark.parametrize("name", POLICIES)
def test_a_colocated_worker_pairs_with_itself_only(name: str) -> None:
    for turn, draw in enumerate(np.linspace(0, 0.999, 20)):
        choice = POLICIES[name](situation([BOTH, BOTH], turn=turn, draw=float(draw)))
        assert (choice.prefill, choice.reason) == (choice.decode, COLOCATED)


@pytest.mark.parametrize("name", POLICIES)
def test_roles_are_kept(name: str) -> None:
    fleet = [DECODE, PREFILL, DECODE, PREFILL]
    seen = Counter[tuple[int, int]]()
    for turn, draw in enumerate(np.linspace(0, 0.999, 40)):
        choice = POLICIES[name](situation(fleet, turn=turn, draw=float(draw)))
        assert choice.reason == DISAGGREGATED
        seen[choice.prefill, choice.decode] += 1
    assert set(seen) <= {(p, d) for p in (1, 3) for d in (0, 2)}
    if name in {"round_robin", "random"}:
        assert len({p for p, _ in seen}) == len({d for _, d in seen}) == 2, "everybody has a turn"


def test_a_prompt_goes_where_its_beginning_is() -> None:
    fleet = [PREFILL, PREFILL._replace(queued_tokens=50), DECODE]
    assert cost(situation(fleet, [0, 0, 0])).prefill == 0
    assert cost(situation(fleet, [0, 80, 0])).prefill == 1, "80 tokens that are there outweigh 50 that are ahead"
    assert cost(situation(fleet, [0, 40, 0])).prefill == 0, "40 do not"


def test_what_decode_knows_is_fetched_from_there() -> None:
    """A conversation whose prefill worker is busy: any other computes what is new, beside the decode worker that knows it."""
    fleet = [PREFILL._replace(queued_tokens=90), PREFILL, DECODE, DECODE._replace(sequences=1)]
    known = [80, 0, 0, 95]
    assert cost(situation(fleet, known, expected_tokens=10.0)).decode == 2, "nobody fetches"
    fetching = [worker._replace(pulls_kv=True) for worker in fleet]
    best = cost(situation(fetching, known, expected_tokens=10.0))
    assert (best.prefill, best.decode) == (1, 3)
    assert best.cost_ms == 5 + 10 * (10 + 2 + 1)
    slow = situation(fetching, known, expected_tokens=10.0, near_ms_per_token=0.5, far_ms_per_token=0.5)
    assert cost(slow).cost_ms == best.cost_ms + 95 * 0.5 + 5 * 0.5
    slower = replace(slow, near_ms_per_token=2.0, far_ms_per_token=2.0)
    assert cost(slower).cost_ms == best.cost_ms + 95 + 5 * 2, "computing takes no longer than that"


def test_short_prompts_stay_on_an_idle_decode_worker() -> None:
    fleet, far = [PREFILL, DECODE], {"hand_over_ms": 10.0, "may_join": True}
    s = situation(fleet, num_tokens=5, expected_tokens=1.0, **far)
    assert (cost(s).prefill, cost(s).reason) == (1, SHORT_PROMPT)
    busy = [PREFILL, DECODE._replace(sequences=8, decode_ms_per_step=0.01, decode_ms_per_sequence=0.01)]
    assert cost(replace(s, columns=situation(busy).columns)).reason == DISAGGREGATED, "eight others would wait"
    slow = [PREFILL._replace(prefill_ms_per_token=21.0), DECODE._replace(prefill_ms_per_token=21.0)]
    assert cost(replace(s, columns=situation(slow).columns)).reason == DISAGGREGATED, "whoever comes next would wait"
    assert cost(replace(s, may_join=False)).reason == DISAGGREGATED


def test_a_prompt_that_decode_knows_stays_there() -> None:
    s = situation([PREFILL, DECODE], [0, 96], hand_over_ms=5.0, expected_tokens=1.0, may_join=True)
    assert (cost(s).prefill, cost(s).reason) == (1, CACHED_ON_DECODE)


def test_an_idle_prefill_worker_decodes_when_decode_is_full() -> None:
    full = DECODE._replace(available_blocks=0, sequences=30)
    s = situation([PREFILL, full], may_join=True)
    assert (cost(s).prefill, cost(s).decode, cost(s).reason) == (0, 0, DECODE_FULL)
    assert cost(situation([PREFILL._replace(queued_tokens=10), full], may_join=True)).reason == DISAGGREGATED


def test_two_ways_that_cost_the_same_do_not_alternate() -> None:
    s = situation([PREFILL, DECODE], num_tokens=5, expected_tokens=1.0, hand_over_ms=0.5, may_join=True)
    first = cost(s)
    assert cost(replace(s, is_split=True)).reason == DISAGGREGATED
    assert cost(replace(s, is_split=False)).reason == SHORT_PROMPT
    assert first.reason == DISAGGREGATED
