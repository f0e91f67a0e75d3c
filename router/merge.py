"""Several asynchronous generators as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")


async def merge(sources: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[Item, None]:
    """Items as they come; of those that are there at once, in the order of `sources`.

    At most one item of each source is taken ahead of the consumer. However this ends (all exhausted, one source failed,
    closed by the consumer), every source is closed before it does. The first failure is raised.
    """
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for item in only:
                yield item
        return
    waiting = {place: asyncio.ensure_future(anext(source)) for place, source in enumerate(sources)}
    try:
        while waiting:
            await asyncio.wait(waiting.values(), return_when=asyncio.FIRST_COMPLETED)
            for place in [place for place, task in sorted(waiting.items()) if task.done()]:
                task = waiting.pop(place)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                yield item
                waiting[place] = asyncio.ensure_future(anext(sources[place]))
    finally:
        for task in waiting.values():
            task.cancel()
        await asyncio.gather(*waiting.values(), return_exceptions=True)
        for source in sources:
            await source.aclose()
