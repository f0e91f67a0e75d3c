import asyncio
from contextlib import aclosing

import pytest

from deploy.valkey import Valkey
from segue.errors import StoreUnavailable, WorkerLost
from segue.membership import Membership, held_lease
from segue.v1.worker_pb2 import WorkerRecord


def record(worker_id: str = "w", epoch: int = 1, **fields: object) -> WorkerRecord:
    return WorkerRecord(worker_id=worker_id, epoch=epoch, **fields)  # type: ignore[arg-type]


async def test_records_are_listed_while_their_lease_holds(membership: Membership) -> None:
    assert await membership.list_workers() == []
    await membership.announce(record("b"), 60_000)
    await membership.announce(record("a"), 60_000)
    await membership.announce(record("gone"), 1)
    while len(found := await membership.list_workers()) > 2:
        pass  # every look takes a round trip to the store
    assert found == [record("a"), record("b")]


async def test_clusters_do_not_see_each_other(membership: Membership, valkey: Valkey) -> None:
    await membership.announce(record(), 60_000)
    async with Membership(valkey.url, "another") as other:
        assert await other.list_workers() == []


async def test_epochs_only_grow(membership: Membership) -> None:
    epochs = [await membership.next_epoch() for _ in range(3)]
    assert epochs == sorted(set(epochs))


async def test_leaving_does_not_remove_the_one_that_came_after(membership: Membership) -> None:
    await membership.announce(record(epoch=1), 60_000)
    await membership.announce(record(epoch=2), 60_000)
    await membership.withdraw(record(epoch=1))
    assert await membership.list_workers() == [record(epoch=2)]
    await membership.withdraw(record(epoch=2))
    assert await membership.list_workers() == []


async def test_one_that_was_replaced_ends_and_changes_nothing(membership: Membership) -> None:
    async def serve() -> None:
        async with held_lease(membership, record, lease_ms=30):
            await membership.announce(record(epoch=2), 60_000)
            await asyncio.Event().wait()

    with pytest.raises(WorkerLost, match="epoch 2 has taken the place of worker w, epoch 1"):
        await serve()
    assert await membership.list_workers() == [record(epoch=2)]
    # Also when nothing is left of the later one.
    await membership.withdraw(record(epoch=2))
    with pytest.raises(WorkerLost):
        await membership.announce(record(epoch=1), 60_000)
    assert await membership.list_workers() == []
    await membership.announce(record("another"), 60_000)


async def test_a_held_lease_is_renewed_with_what_is_true_now_and_withdrawn(membership: Membership) -> None:
    current = record(draining=False)
    async with held_lease(membership, lambda: current, lease_ms=300), aclosing(membership.changes(0.01)) as changes:
        current = record(draining=True)
        async for _ in changes:
            if (await membership.list_workers())[0].draining:
                break
    assert await membership.list_workers() == []


async def test_changes_are_told(membership: Membership) -> None:
    async with aclosing(membership.changes(60.0)) as changes:
        await anext(changes)
        waiting = asyncio.create_task(anext(changes))
        while not waiting.done():  # the subscription may not be there at the first change
            await membership.announce(record(epoch=await membership.next_epoch()), 60_000)
            await asyncio.wait({waiting}, timeout=0.05)


async def test_a_follower_can_be_cancelled_at_any_moment(membership: Membership) -> None:
    """Also while its connection to the store is being made, where redis swallows cancellations."""

    async def follow() -> None:
        async with aclosing(membership.changes(60.0)) as changes:
            async for _ in changes:
                await membership.list_workers()

    for num_steps in range(60):
        following = asyncio.create_task(follow())
        for _ in range(num_steps):
            await asyncio.sleep(0)
        following.cancel()
        await asyncio.wait({following}, timeout=20)
        assert following.cancelled(), f"after {num_steps} steps of the loop"


async def test_an_unreadable_record_is_left_out(membership: Membership, valkey: Valkey, cluster_id: str) -> None:
    await membership.announce(record(), 60_000)
    await membership._redis.set(f"segue:{cluster_id}:worker:junk", b"\xff\xff\xff")
    assert await membership.list_workers() == [record()]


async def test_a_store_that_does_not_answer_is_said(cluster_id: str) -> None:
    async with Membership("redis://127.0.0.1:1/0", cluster_id) as nowhere:
        with pytest.raises(StoreUnavailable):
            await nowhere.list_workers()
        with pytest.raises(StoreUnavailable):
            await nowhere.next_epoch()


async def test_every_rank_of_a_group_takes_its_address_once(membership: Membership) -> None:
    early = asyncio.create_task(membership.take_address("g"))
    await membership.leave_address("another", "elsewhere:1", 1)
    await membership.leave_address("g", "here:1", 2)
    assert await early == await membership.take_address("g") == "here:1"
    late = asyncio.create_task(membership.take_address("g"))
    assert await membership.take_address("another") == "elsewhere:1"
    assert not late.done()
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late


async def test_a_connection_that_timed_out_is_replaced(membership: Membership, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel calls ETIMEDOUT is a TimeoutError, which redis takes for silence, over and over."""
    made = []
    make = membership._redis.pubsub
    monkeypatch.setattr(membership._redis, "pubsub", lambda: made.append(make()) or made[-1])
    async with aclosing(membership.changes(0.1)) as changes:
        for _ in range(3):
            await anext(changes)
        (first,) = made
        first.connection._reader.set_exception(TimeoutError(110, "Connection timed out"))
        while len(made) < 2:
            await anext(changes)
        for _ in range(3):
            await anext(changes)
        assert len(made) == 2, "the new one is sound"
        waiting = asyncio.create_task(anext(changes))
        await membership.announce(record(), 60_000)
        await waiting
