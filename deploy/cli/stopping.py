"""Ctrl-C once: stop in order. Twice: stop at once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine

from rich.console import Console

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130


async def run_until_stopped(work: Callable[[], Coroutine[None, None, None]], console: Console) -> int:
    """Runs `work` until it ends or a stop signal cancels it; gives the exit code. A second signal ends the process there and
    then: what it started is tethered to it, and the kernel ends that too."""
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(work())
    stopping = False

    def stop() -> None:
        nonlocal stopping
        if stopping:
            os._exit(INTERRUPTED)
        stopping = True
        console.print("\nstopping (Ctrl-C again: at once)")
        task.cancel()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not stopping:
            raise
        console.print("stopped")
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
    return 0
