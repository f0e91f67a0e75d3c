"""What every long-running process does the same way: its event loop, its stop signals, its first and last words.

A process says on stdout, in one line of JSON, that it serves (and where) or why it does not; whoever started it reads that.
Everything else it has to say goes to stderr.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager

from segue.config import LogFormat
from segue.errors import SegueError
from segue.logs import set_up_logging


def run_process(main: Callable[[], Coroutine[None, None, None]], log_format: LogFormat = "text", **process: str) -> int:
    """Runs `main` on uvloop until it returns; gives the exit code. A SegueError is reported in the failed line. How it
    logs says segue.logs.set_up_logging."""
    import uvloop

    set_up_logging(log_format, **process)
    try:
        uvloop.run(main())
    except SegueError as error:
        _say({"event": "failed", "code": error.code, "error": error.message})
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def say_serving(**addresses: str) -> None:
    _say({"event": "serving", **addresses})


def _say(line: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def stop_event() -> asyncio.Event:
    """An event that SIGTERM or SIGINT sets. Must be called on the main thread, within the running loop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


def event_that_is_set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@asynccontextmanager
async def background(*coroutines: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Runs `coroutines` beside the block and cancels them at its end. One that ends by itself is let be; one that raises
    ends the block with its error: nothing fails unseen. (A TaskGroup would wrap the block's own errors in a group.)"""
    owner = asyncio.current_task()
    assert owner is not None
    failures: list[BaseException] = []

    def on_done(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            failures.append(error)
            owner.cancel()

    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    for task in tasks:
        task.add_done_callback(on_done)
    try:
        yield
    except asyncio.CancelledError:
        if failures and owner.uncancel() == 0:
            raise failures[0] from None
        raise
    finally:
        for task in tasks:
            task.remove_done_callback(on_done)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Wakeups:
    """Tells every listener that something changed, without saying what. A listener that was busy meanwhile sees it later."""

    def __init__(self) -> None:
        self._listeners: list[asyncio.Event] = []

    def listener(self) -> asyncio.Event:
        event = asyncio.Event()
        self._listeners.append(event)
        return event

    @contextmanager
    def listening(self) -> Iterator[asyncio.Event]:
        """A listener for as long as the block runs."""
        event = self.listener()
        try:
            yield event
        finally:
            self._listeners.remove(event)

    def notify(self) -> None:
        for event in self._listeners:
            event.set()
