import asyncio

import pytest

from segue.runtime import Wakeups, background


async def test_background_work_is_cancelled_with_its_block() -> None:
    ended = asyncio.Event()

    async def forever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with background(forever()):
        await asyncio.sleep(0)
    assert ended.is_set()


async def test_an_error_in_the_background_ends_the_block_with_that_error() -> None:
    async def fail() -> None:
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        async with background(fail()):
            await asyncio.Event().wait()
    await asyncio.sleep(0)  # and leaves no cancellation behind


async def test_an_error_of_the_block_is_its_own() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    with pytest.raises(KeyError, match="mine"):
        async with background(forever()):
            raise KeyError("mine")


async def test_cancelling_the_owner_still_cancels_it() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    async def owner() -> None:
        async with background(forever()):
            await asyncio.Event().wait()

    task = asyncio.create_task(owner())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_every_listener_sees_a_wakeup() -> None:
    wakeups = Wakeups()
    listeners = [wakeups.listener(), wakeups.listener()]
    wakeups.notify()
    assert all(listener.is_set() for listener in listeners)
