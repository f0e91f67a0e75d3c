from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations

import pytest
from hypothesis import example, given
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
    st.integers(0, 10),
)
def test_what_is_ahead(others: list[tuple[str, int, int]], tenant: str, priority: int, num_served: int) -> None:
    """The estimate is what is then served first, but for a last entry of each other tenant."""
    queue: FairQueue[str] = FairQueue()
    for other, level, size in others:
        queue.push(entry("other", other, level, size))
    for _ in range(min(num_served, len(queue))):
        queue.pop()
    estimate = queue.cost_ahead(tenant, priority)
    queue.push(entry("mine", tenant, priority))
    ahead = 0
    while (waiting := queue.pop()).entry != "mine":
        ahead += waiting.cost
    assert estimate <= ahead <= estimate + LARGEST * len({"a", "b", "c"} - {tenant})


@dataclass
class Cluster:
    """A queue, and what becomes of those who wait in it. Properties that always hold are checked with each step."""

    queue: FairQueue[str] = field(default_factory=FairQueue)
    waiting: list[Waiting[str]] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    # Tokens served to each tenant.
    served: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    # What each of two tenants had been served when the later of them began to wait, for as long as both wait.
    both_wait: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def come(self, tenant: str, cost: int, priority: int = 0) -> None:
        self.waiting.append(entry(str(len(self.waiting)), tenant, priority, cost))
        self.queue.push(self.waiting[-1])

    def step(self, what: str, tenant: str, number: int, priority: int = 0) -> None:
        """`come` of `tenant`; the others of whoever is there, if anybody is."""
        floor, starts = self.queue._floor, {level: self.queue._start(level) for level in (-1, 0, 1)}
        if what == "come":
            self.come(tenant, number, priority)
        elif what == "pop" and self.waiting:
            popped = self.queue.pop()
            self.waiting.remove(popped)
            self.running.append(popped.tenant)
            self.served[popped.tenant] += popped.cost
        elif what == "leave" and self.waiting:
            self.queue.remove(self.waiting.pop(number % len(self.waiting)))
        elif what == "pay" and self.running:
            self.queue.pay(self.running[number % len(self.running)], number)
        elif what == "end" and self.running:
            self.queue.end(self.running.pop(number % len(self.running)))
        assert self.queue._floor >= floor, "the floor never falls"
        assert all(self.queue._start(level) >= start for level, start in starts.items()), "nor does what newcomers start from"
        assert len(self.queue) == len(self.waiting)

    def look_at_pairs(self, tenants: str) -> None:
        waiting = {one.tenant for one in self.waiting}
        for pair in combinations(tenants, 2):
            if waiting.issuperset(pair):
                self.both_wait.setdefault(pair, (self.served[pair[0]], self.served[pair[1]]))
            else:
                self.both_wait.pop(pair, None)


kinds, names, numbers = (
    st.sampled_from(["come", "come", "pop", "leave", "pay", "end"]),
    st.sampled_from("abcd"),
    st.integers(1, LARGEST),
)
steps = st.lists(st.tuples(kinds, names, numbers), max_size=120)


@given(st.lists(st.tuples(kinds, names, numbers, st.integers(-1, 1)), max_size=120))
@example(
    # `b`, which paid more, is forgotten first: where newcomers start does not fall to what `a` has paid.
    [("come", "a", 1, 0), ("pop", "a", 1, 0), ("come", "b", 1, 0), ("pop", "b", 1, 0), ("end", "b", 1, 0), ("end", "a", 2, 0)]
)
def test_neither_the_floor_nor_the_start_ever_falls(some: list[tuple[str, str, int, int]]) -> None:
    cluster = Cluster()
    for what, tenant, number, priority in some:
        cluster.step(what, tenant, number, priority)


@given(steps)
def test_nobody_saves_up_by_idling(some: list[tuple[str, str, int]]) -> None:
    """Whatever came before: from when two tenants both wait, neither is served two entries more than the other."""
    cluster = Cluster()
    for what, tenant, number in some:
        # What was generated is paid for as well, and makes up for nothing here.
        if what != "pay":
            cluster.step(what, tenant, number)
        cluster.look_at_pairs("abcd")
        for (one, other), (one_before, other_before) in cluster.both_wait.items():
            more = (cluster.served[one] - one_before) - (cluster.served[other] - other_before)
            assert abs(more) <= 2 * LARGEST


@given(steps, steps.filter(bool))
def test_a_newcomer_waits_for_one_entry_of_each_other_at_most(
    before: list[tuple[str, str, int]], meanwhile: list[tuple[str, str, int]]
) -> None:
    """However much they ask for, before it and after."""
    cluster = Cluster()
    for what, tenant, number in before:
        cluster.step(what, tenant, number)
    cluster.come("new", LARGEST)
    others = list[str]()
    for what, tenant, number in [*meanwhile, *[("pop", "", 0)] * 1000]:
        if what in {"come", "pay"}:
            cluster.step(what, tenant, number)
        elif what == "pop":
            cluster.step(what, tenant, number)
            if cluster.running[-1] == "new":
                break
            others.append(cluster.running[-1])
    assert len(others) == len(set(others))


@given(steps, st.lists(st.integers(1, LARGEST), min_size=1, max_size=20))
def test_nobody_starves(before: list[tuple[str, str, int]], costs: list[int]) -> None:
    """Though the others ask for more each time that one of them is served, and a new one comes as well."""
    cluster = Cluster()
    for what, tenant, number in before:
        cluster.step(what, tenant, number)
    for tenant in "abcd":
        cluster.come(tenant, LARGEST)
    victim = cluster.waiting[0]
    paid = {name: tenant.paid for name, tenant in cluster.queue._tenants.items()}
    own = sum(one.cost for one in cluster.waiting if one.tenant == victim.tenant)
    # Each of the others may catch up with it, and have an entry more; a new one has a single entry.
    lag = sum(max(paid[victim.tenant] - paid[name], 0) for name in paid)
    bound = lag + len(paid) * (own + LARGEST) + 1000
    for number in range(int(bound)):
        cluster.step("pop", "", 0)
        last = cluster.running[-1]
        cluster.come(last if last in "abcd" else "a", costs[number % len(costs)])
        if number < 20:
            cluster.come(f"new{number}", 1)
        if victim not in cluster.waiting:
            break
    assert victim not in cluster.waiting


def test_who_only_runs_does_not_draw_newcomers_down() -> None:
    """`r` has paid little and waits for nothing: `new` starts from `a`, which waits."""
    queue: FairQueue[str] = FairQueue()
    queue.push(entry("r1", "r", cost=1))
    queue.pop()
    for number in range(100):
        queue.push(entry(f"a{number}"))
    for _ in range(50):
        queue.pop()
    for number in range(10):
        queue.push(entry(f"new{number}", "new"))
    assert [queue.pop().tenant for _ in range(10)].count("new") == 5


def test_who_only_runs_does_not_lift_newcomers() -> None:
    """`r` has paid much and waits for nothing: `new` starts from `a`, which waits."""
    queue: FairQueue[str] = FairQueue()
    queue.push(entry("r1", "r"))
    queue.pop()
    for number in range(20):
        queue.push(entry(f"a{number}"))
    queue.pay("r", 10_000)
    for number in range(10):
        queue.push(entry(f"new{number}", "new"))
    assert [queue.pop().tenant for _ in range(10)].count("new") == 5


def test_who_waits_at_another_priority_does_not_draw_newcomers_down() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push(entry("later", "l", priority=1))
    for number in range(100):
        queue.push(entry(f"a{number}"))
    for _ in range(50):
        queue.pop()
    for number in range(10):
        queue.push(entry(f"new{number}", "new"))
    assert [queue.pop().tenant for _ in range(10)].count("new") == 5
