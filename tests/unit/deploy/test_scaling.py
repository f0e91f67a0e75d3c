"""What is started and sent away for what operators ask. The store is real, the workers are names."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.cli.scale import describe, parse_sizes
from deploy.scaling import Scaling, missing, tell_to_leave, too_many
from deploy.valkey import Valkey
from router.operations import Operations
from segue.client.status import ScaleStatus
from segue.errors import ConfigError, InvalidRequest, RequestError
from segue.membership import Membership
from segue.pools import PoolStore, pool_roles
from segue.v1.worker_pb2 import PoolReport, WorkerRecord


class FakeReplicas:
    def __init__(self, *running: str) -> None:
        self.running = list(running)
        self.ended: list[str] = []

    def start(self, worker_id: str) -> None:
        self.running.append(worker_id)

    def end(self, worker_id: str) -> None:
        self.running.remove(worker_id)
        self.ended.append(worker_id)

    def what_is_missing(self, worker_ids: Iterable[str]) -> str:
        return " ".join(["no room for", *worker_ids])


class Town:
    """Replicas that are followed, and a membership that they are in as told."""

    def __init__(self, membership: Membership, store: PoolStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.membership = membership
        self.store = store
        self.told: list[tuple[str, int]] = []
        self.replicas = FakeReplicas("prefill-0", "decode-0")
        self.scaling = Scaling(self.replicas, membership, store, None)
        monkeypatch.setattr("deploy.scaling.tell_to_leave", self._tell)

    async def _tell(self, record: WorkerRecord, _credentials: None) -> bool:
        self.told.append((record.worker_id, record.epoch))
        return True

    async def serve(self, *worker_ids: str, epoch: int = 1) -> None:
        for worker_id in worker_ids:
            await self.membership.announce(WorkerRecord(worker_id=worker_id, epoch=epoch), 60_000)

    async def leave(self, worker_id: str, epoch: int = 1) -> None:
        await self.membership.withdraw(WorkerRecord(worker_id=worker_id, epoch=epoch))
        self.replicas.running.remove(worker_id)

    async def look(self) -> PoolReport:
        await self.scaling.look()
        report = await self.store.report()
        assert report is not None
        return report


@pytest.fixture
async def store(valkey: Valkey, cluster_id: str) -> AsyncIterator[PoolStore]:
    async with PoolStore(valkey.url, cluster_id) as store:
        yield store


@pytest.fixture
def town(membership: Membership, store: PoolStore, monkeypatch: pytest.MonkeyPatch) -> Town:
    return Town(membership, store, monkeypatch)


async def test_up_and_down_again(town: Town) -> None:
    await town.serve("prefill-0", "decode-0")
    report = await town.look()
    assert (report.wanted.prefill, report.wanted.decode, report.wanted.revision) == (1, 1, 0)
    assert not [*report.starting, *report.leaving]

    asked = await town.store.ask(2, 3)
    report = await town.look()
    assert report.wanted == asked
    assert report.starting == ["prefill-1", "decode-1", "decode-2"]
    assert report.problem == "no room for prefill-1 decode-1 decode-2"
    assert town.replicas.running == ["prefill-0", "decode-0", "prefill-1", "decode-1", "decode-2"]
    await town.serve("prefill-1", "decode-1", "decode-2")
    assert not (await town.look()).starting

    await town.store.ask(1, 1)
    for _ in range(2):  # each is told once
        report = await town.look()
    assert report.leaving == ["prefill-1", "decode-2", "decode-1"]
    assert sorted(town.told) == [("decode-1", 1), ("decode-2", 1), ("prefill-1", 1)]
    for worker_id in ("prefill-1", "decode-2", "decode-1"):
        await town.leave(worker_id)
    assert not (await town.look()).leaving
    assert not town.replicas.ended


async def test_one_that_starts_anew_instead_of_leaving_is_told_again(town: Town) -> None:
    await town.serve("prefill-0", "decode-0", "decode-1")
    town.replicas.start("decode-1")
    await town.store.ask(1, 1)
    await town.look()
    await town.serve("decode-1", epoch=2)
    await town.look()
    assert town.told == [("decode-1", 1), ("decode-1", 2)]


async def test_one_that_serves_nobody_is_ended(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    await town.serve("prefill-0", "decode-0")
    await town.store.ask(1, 3)
    await town.look()
    await town.serve("decode-1")
    await town.look()
    await town.membership.withdraw(WorkerRecord(worker_id="decode-1", epoch=1))
    await town.store.ask(1, 1)
    assert (await town.look()).leaving == ["decode-2", "decode-1"]
    assert town.replicas.ended == ["decode-2"], "the other one may be about to leave"
    monkeypatch.setattr("deploy.scaling._ABSENCE_LIMIT_S", 0.0)
    await town.look()
    assert town.replicas.ended == ["decode-2", "decode-1"]
    assert not town.told

    # Started anew under the same name, it has not come yet.
    monkeypatch.setattr("deploy.scaling._ABSENCE_LIMIT_S", 1e6)
    await town.store.ask(1, 2)
    await town.look()
    await town.store.ask(1, 1)
    await town.look()
    assert town.replicas.ended == ["decode-2", "decode-1", "decode-1"]


async def test_one_that_is_wanted_again_while_it_leaves_is_started_when_it_is_gone(town: Town) -> None:
    await town.serve("prefill-0", "decode-0", "decode-1")
    town.replicas.start("decode-1")
    await town.store.ask(1, 1)
    await town.look()
    await town.store.ask(1, 2)
    assert (await town.look()).starting == ["decode-1"]
    assert town.replicas.running.count("decode-1") == 1
    await town.leave("decode-1")
    await town.look()
    assert "decode-1" in town.replicas.running
    await town.serve("decode-1", epoch=2)
    assert not (await town.look()).starting


async def test_one_that_somebody_else_sent_away_stays_away_until_the_next_wish(town: Town) -> None:
    await town.serve("prefill-0", "decode-0")
    await town.look()
    await town.leave("decode-0")
    assert (await town.look()).starting == ["decode-0"]
    assert town.replicas.running == ["prefill-0"]
    await town.store.ask(1, 1)
    await town.look()
    assert town.replicas.running == ["prefill-0", "decode-0"]


async def test_a_worker_that_cannot_be_reached_is_not_told() -> None:
    assert not await tell_to_leave(WorkerRecord(worker_id="w", epoch=1, address="127.0.0.1:1"), None)


SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(SIZES, SIZES)
def test_a_plan_leads_from_any_sizes_to_any(before: tuple[int, int], after: tuple[int, int]) -> None:
    running, wanted = pool_roles(*before), pool_roles(*after)
    leaving = too_many(wanted, running)
    assert (set(running) - set(leaving)) | set(missing(wanted, running)) == set(wanted)
    for role in ("prefill", "decode"):
        numbers = [int(name.rpartition("-")[2]) for name in leaving if name.startswith(role)]
        assert numbers == sorted(numbers, reverse=True)


async def test_what_a_router_makes_of_it(store: PoolStore) -> None:
    operations = Operations(None, store)  # type: ignore[arg-type]  # no worker is asked
    with pytest.raises(RequestError, match=r"nobody follows .*\(kubectl scale"):
        await operations.scale(2, 2)
    assert await store.wanted() is None
    following = PoolReport(starting=["decode-1"], problem="no room")
    following.wanted.prefill = following.wanted.decode = 1
    await store.tell(following, 60_000)
    for field, numbers in {"prefill": (0, None), "decode": (None, 65)}.items():
        with pytest.raises(InvalidRequest, match=f"{field}: must be 1 to 64, not"):
            await operations.scale(*numbers)
    answer = await operations.scale(None, 4)
    assert (answer.prefill, answer.decode, answer.done, answer.problem) == (1, 4, False, "no room")
    del following.starting[:]
    await store.tell(following, 60_000)
    assert not (await operations.scale(None, None)).done, "the report is from before the wish"
    wanted = await store.wanted()
    assert wanted is not None
    following.wanted.CopyFrom(wanted)
    await store.tell(following, 60_000)
    assert (await operations.scale(None, None)).done


def test_what_a_person_writes_and_reads() -> None:
    assert parse_sizes(["decode=5", "prefill=3"]) == {"prefill": 3, "decode": 5}
    for words in (["decode"], ["decode=-1"], ["router=2"], ["decode=1.5"], ["decode=1", "decode=2"]):
        with pytest.raises(ConfigError, match=r"decode|router"):
            parse_sizes(words)
    status = ScaleStatus(3, 5, False, ("decode-4",), ("prefill-3",), "no room")
    assert describe(status) == "to 3 prefill and 5 decode workers; starting decode-4; finishing prefill-3; no room"
