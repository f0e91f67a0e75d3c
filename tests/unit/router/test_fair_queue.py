from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fair_queue import FairQueue, Waiting

LARGEST = 50


def entry(name: str, tenant: str = "a", priority: int = 0, cost: int = 10) -> Waiting[str]:
    return Waiting(name, tenant, priority, cost)


def drain(queue: FairQueue[str]) -> list[str]:
    return [queue.pop().entry for _ in range(len(queue))]


def test_priority_then_fairness_then_arrival() -> None:
    queue: FairQueue[str] = FairQueue()
    for waiting in [entry("a1"), entry("a2"), entry("a3"), entry("b1", "b"), entry("first", "b", -1), entry("last", "a", 1)]:
        queue.push(waiting)
    assert drain(queue) == ["first", "a1", "a2", "b1", "a3", "last"]
    with pytest.raises(IndexError):
        queue.pop()


def test_who_waits_no_longer_pays_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    gone = entry("gone", cost=1000)
    queue.push(gone)
    queue.push(entry("b1", "b"))
    queue.push(entry("a1"))
    queue.remove(gone)
    assert drain(queue) == ["a1", "b1"] or drain(queue) == []
    assert len(queue) == 0


def test_nobody_saves_up() -> None:
    """`b` comes when `a` has been served for long: it does not have everything to itself then."""
    queue: FairQueue[str] = FairQueue()
    for number in range(100):
        queue.push(entry(f"a{number}"))
    for _ in range(50):
        queue.pop()
    for number in range(10):
        queue.push(entry(f"b{number}", "b"))
    assert {name[0] for name in drain(queue)[:4]} == {"a", "b"}


def test_what_was_generated_counts_as_well() -> None:
    queue: FairQueue[str] = FairQueue()
    for tenant in "ab":
        for number in range(4):
            queue.push(entry(f"{tenant}{number}", tenant))
    assert [queue.pop().tenant for _ in range(2)] == ["a", "b"]
    queue.pay("a", 25)
    assert drain(queue) == ["b1", "b2", "b3", "a1", "a2", "a3"]


def test_idle_tenants_are_forgotten() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(1000):
        queue.push(entry("x", f"t{number}"))
        queue.pop()
        queue.end(f"t{number}")
    assert len(queue._tenants) <= 2


weights = st.sampled_from([1.0, 2.0, 4.0])


@given(
    st.dictionaries(st.sampled_from("abc"), weights, min_size=2),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, LARGEST)), min_size=20, max_size=200),
)
def test_the_bound_of_the_paper(tenants: dict[str, float], asked: list[tuple[str, int]]) -> None:
    """While two tenants both wait, what one was served more than the other, over its weight, is less than two entries."""
    queue: FairQueue[str] = FairQueue()
    left = defaultdict[str, int](int)
    for number, (tenant, cost) in enumerate(asked):
        if tenant in tenants:
            queue.push(entry(str(number), tenant, cost=cost), tenants[tenant])
            left[tenant] += 1
    served = dict.fromkeys(tenants, 0.0)
    while all(left[tenant] for tenant in tenants):
        waiting = queue.pop()
        left[waiting.tenant] -= 1
        served[waiting.tenant] += waiting.cost / tenants[waiting.tenant]
        assert max(served.values()) - min(served.values()) <= 2 * LARGEST


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 1), st.integers(1, LARGEST)), max_size=30),
    st.sampled_from("abcd"),
    st.integers(-1, 1),
    st.integers(1, LARGEST),
    st.integers(0, 10),
)
def test_what_is_ahead(others: list[tuple[str, int, int]], tenant: str, priority: int, cost: int, num_served: int) -> None:
    """The estimate is what would be served first, up to an entry of each other tenant."""
    queue: FairQueue[str] = FairQueue()
    for other, level, size in others:
        queue.push(entry("other", other, level, size))
    for _ in range(min(num_served, len(queue))):
        queue.pop()
    estimate = queue.cost_ahead(tenant, priority, cost)
    queue.push(entry("mine", tenant, priority, cost))
    ahead = 0
    while (waiting := queue.pop()).entry != "mine":
        ahead += waiting.cost
    assert abs(estimate - ahead) <= 3 * LARGEST + 3 * cost
