from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from math import inf

import pytest

from router.admission import Admission
from router.caller import Caller
from router.fleet import Fleet, WorkerFacts
from router.sequence import SequenceRequest
from segue.errors import DeadlineExceeded, Overloaded
from segue.sampling import SamplingParams


class Half:
    """One worker, as the router counts it."""

    def __init__(self, *, decodes: bool) -> None:
        self.values = {"queued_tokens": 0, "unreserved": 0}
        self._decodes = decodes

    def facts(self) -> WorkerFacts:
        return WorkerFacts(
            available=True,
            prefills=not self._decodes,
            decodes=self._decodes,
            layout=1,
            formats=1,
            host=1,
            pulls_kv=False,
            block_size=16,
            capacity_tokens=1000,
            sequences=0,
            available_blocks=100,
            prefill_ms_per_token=1.0,
            **self.values,
        )


class Pair:
    """A prefill and a decode worker."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self._halves = [Half(decodes=False), Half(decodes=True)]
        self._rows = [self.fleet.join(half) for half in self._halves]

    def set(self, *, queued_tokens: int = 0, unreserved: int = 0) -> None:
        self._halves[0].values["queued_tokens"] = queued_tokens
        self._halves[1].values["unreserved"] = unreserved
        for row in self._rows:
            self.fleet.changed(row)


def request(num_tokens: int = 100, tenant: str = "", priority: int = 0) -> SequenceRequest:
    return SequenceRequest(
        "s", tuple(range(num_tokens)), SamplingParams(max_tokens=4), caller=Caller(tenant, priority=priority)
    )


def admission(pair: Pair, *, max_active: int = 100, max_waiting: int = 100, max_wait_s: float = 60.0) -> Admission:
    return Admission(pair.fleet, max_active=max_active, max_waiting=max_waiting, max_wait_s=max_wait_s)


@pytest.fixture
def pair() -> Pair:
    return Pair()


async def come(gate: Admission, name: str, order: list[str], leave: asyncio.Event, **what: object) -> None:
    async with gate.admitted(request(**what), inf):  # type: ignore[arg-type]
        order.append(name)
        await leave.wait()


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_who_finds_room_does_not_wait(pair: Pair) -> None:
    gate = admission(pair)
    async with AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(gate.admitted(request(), inf))
        assert (gate.num_active, gate.num_waiting) == (5, 0)
    assert gate.num_active == 0


@pytest.mark.parametrize("full", [{"queued_tokens": 500}, {"unreserved": 4}])
async def test_who_finds_none_waits_in_a_fair_order(pair: Pair, full: dict[str, int]) -> None:
    gate, order, leave = admission(pair), list[str](), asyncio.Event()
    pair.set(**full)
    async with asyncio.TaskGroup() as group:
        for name, what in {
            "a1": {"tenant": "a"},
            "a2": {"tenant": "a"},
            "b1": {"tenant": "b"},
            "urgent": {"priority": -1},
        }.items():
            group.create_task(come(gate, name, order, leave, **what))
            await settle()
        assert (order, gate.num_waiting) == ([], 4)
        pair.set()
        await settle()
        assert order == ["urgent", "a1", "b1", "a2"]
        leave.set()
    assert (gate.num_active, gate.num_waiting) == (0, 0)


async def test_each_is_charged_before_the_next_is_let_in(pair: Pair) -> None:
    gate, order = admission(pair), list[str]()

    async def take_all_room(name: str) -> None:
        async with gate.admitted(request(), inf):
            order.append(name)
            pair.set(queued_tokens=500)
            await asyncio.sleep(0.001)
            order.append(f"{name} ends")
        pair.set()

    pair.set(queued_tokens=500)
    tasks = [asyncio.create_task(take_all_room(name)) for name in "abc"]
    await settle()
    pair.set()
    await asyncio.gather(*tasks)
    assert order == ["a", "a ends", "b", "b ends", "c", "c ends"]


async def test_who_leaves_while_waiting_takes_nobodys_turn(pair: Pair) -> None:
    gate, order, leave = admission(pair), list[str](), asyncio.Event()
    leave.set()
    pair.set(queued_tokens=500)
    first = asyncio.create_task(come(gate, "first", order, leave))
    second = asyncio.create_task(come(gate, "second", order, leave))
    await settle()
    first.cancel()
    pair.set()
    await second
    assert (order, gate.num_active, gate.num_waiting) == (["second"], 0, 0)


@pytest.mark.parametrize("turn_comes_first", [True, False])
async def test_who_leaves_in_the_moment_of_its_turn_gives_it_back(pair: Pair, turn_comes_first: bool) -> None:
    gate, order, leave = admission(pair, max_active=1), list[str](), asyncio.Event()
    leave.set()
    pair.set(queued_tokens=500)
    first = asyncio.create_task(come(gate, "first", order, leave))
    second = asyncio.create_task(come(gate, "second", order, leave))
    await settle()
    pair.set()
    moments = [gate._pump, first.cancel]
    for moment in moments if turn_comes_first else reversed(moments):
        moment()
    await second
    assert (order, gate.num_active, gate.num_waiting) == (["second"], 0, 0)


async def test_a_deadline_ends_the_wait(pair: Pair) -> None:
    gate, now_s = admission(pair), asyncio.get_running_loop().time()
    with pytest.raises(DeadlineExceeded, match="before the request began"):
        await gate.admitted(request(), now_s - 1).__aenter__()
    pair.set(queued_tokens=500)
    with pytest.raises(DeadlineExceeded, match="turn did not come"):
        await gate.admitted(request(), now_s + 0.05).__aenter__()
    assert (gate.num_active, gate.num_waiting) == (0, 0)


async def test_who_would_wait_too_long_is_told_at_once(pair: Pair) -> None:
    gate, order, leave = admission(pair, max_wait_s=1.0), list[str](), asyncio.Event()
    pair.set(queued_tokens=500)
    async with asyncio.TaskGroup() as group:
        for number in range(2):
            group.create_task(come(gate, str(number), order, leave, num_tokens=900, tenant="heavy"))
        await settle()
        with pytest.raises(Overloaded, match=r"would wait 1\.8 s") as caught:
            await gate.admitted(request(900, "heavy"), inf).__aenter__()
        assert caught.value.retry_after_s == pytest.approx(1.0)
        light = group.create_task(come(gate, "light", order, leave, num_tokens=10, tenant="light"))
        await settle()
        assert not light.done(), "a tenant with little to ask for waits behind little"
        leave.set()
        pair.set()
    assert order[1] == "light"


async def test_the_queue_is_bounded(pair: Pair) -> None:
    gate, order, leave = admission(pair, max_waiting=1), list[str](), asyncio.Event()
    pair.set(queued_tokens=500)
    task = asyncio.create_task(come(gate, "first", order, leave))
    await settle()
    with pytest.raises(Overloaded, match="1 requests wait"):
        await gate.admitted(request(), inf).__aenter__()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert gate.num_waiting == 0


class Clock:
    """The loop's, in the test's hands."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now_s)


async def test_the_pace_of_bursts_is_that_of_all_their_gaps(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty come in at once, each second: twenty times 100 tokens a second."""
    gate, clock = admission(pair, max_active=20, max_waiting=1000), Clock(monkeypatch)
    waves: list[list[asyncio.Event]] = [[asyncio.Event() for _ in range(20)] for _ in range(15)]
    async with asyncio.TaskGroup() as group:
        for leave in [leave for wave in waves for leave in wave]:
            group.create_task(come(gate, "", [], leave))
        await settle()
        for number, wave in enumerate(waves):
            assert gate.num_waiting == 20 * (len(waves) - 1 - number)
            if number >= 3:
                assert gate.predicted_wait_s(request()) == pytest.approx(gate.num_waiting / 20, rel=0.35)
            clock.now_s += 1.0
            for leave in wave:
                leave.set()
            await settle()


async def test_the_pace_is_learned_from_one_that_waits_alone_but_not_from_idle_times(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, clock, order = admission(pair, max_active=1), Clock(monkeypatch), list[str]()
    async with asyncio.TaskGroup() as group:
        for number in range(4):
            first, second = asyncio.Event(), asyncio.Event()
            group.create_task(come(gate, f"{number}a", order, first))
            await settle()
            group.create_task(come(gate, f"{number}b", order, second))
            await settle()
            clock.now_s += 2.0
            first.set()
            await settle()
            second.set()
            await settle()
            # Idle.
            clock.now_s += 500.0
        assert len(order) == 8
        hold, leave = asyncio.Event(), asyncio.Event()
        group.create_task(come(gate, "c", order, hold))
        await settle()
        group.create_task(come(gate, "d", order, leave))
        await settle()
        assert gate.predicted_wait_s(request()) == pytest.approx(2.0)
        hold.set()
        leave.set()
