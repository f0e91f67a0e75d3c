"""Notices the death of another process on this host, at once and without doubt."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from kv_transfer.identity import process_start_time


class ProcessWatch:
    """Calls `on_death` once, on the running event loop, when the process and all its threads are gone.

    A pidfd is used since nothing else proves that: a connection may break while the process lives on and writes.
    Raises OSError where the kernel has no pidfd, and ProcessLookupError (one of them) when the process is not there any more.
    """

    def __init__(self, pid: int, start_time: int, on_death: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_death = on_death
        self._fd: int | None = os.pidfd_open(pid)
        # Only now does the pid stand for one process; before, it might have been used again.
        try:
            if process_start_time(pid) != start_time:
                raise ProcessLookupError(f"process {pid} is another one by now")
        except OSError:
            self.close()
            raise
        self._loop.add_reader(self._fd, self._died)

    def _died(self) -> None:
        self.close()
        self._on_death()

    def close(self) -> None:
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = None
