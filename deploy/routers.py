"""The routers of this host, behind one address: started, brought back when they die or hang, stopped.

The first one may choose the ports; the others listen on the same ones, and the kernel gives each connection to one of them.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from deploy.router_process import RouterProcess, port_of
from deploy.waiting import all_of
from segue.config import RouterSettings
from segue.errors import StoreUnavailable
from segue.membership import Membership

# A router whose lease has lapsed, and does not come back for so long, hangs: it is killed and started again.
_HUNG_S = 10.0
_BETWEEN_LOOKS_S = 1.0


class Routers:
    def __init__(self, planned: Sequence[RouterSettings], logs: Path, command: Sequence[str]) -> None:
        self._planned = planned
        self._logs = logs
        self._command = command
        self.processes: list[RouterProcess] = []

    @property
    def http(self) -> str:
        return self.processes[0].http

    @property
    def grpc(self) -> str:
        return self.processes[0].grpc

    async def start(self) -> None:
        """Returns when the first one runs."""
        await self._start(self._planned[0])

    async def serving(self) -> None:
        """Waits until all serve. Raises what one says is wrong, or the end of its log."""
        await self.processes[0].serving()
        ports = {"http_port": port_of(self.http), "grpc_port": port_of(self.grpc)}
        for settings in self._planned[1:]:
            await self._start(settings.model_copy(update=ports))
        await all_of(*(router.serving() for router in self.processes[1:]))

    async def _start(self, settings: RouterSettings) -> None:
        log = self._logs / f"{settings.router_id}.log"
        self.processes.append(await RouterProcess.start(settings, log, self._command))

    async def keep(self, membership: Membership, note: Callable[[str], None]) -> None:
        """Starts each again when it dies, and kills it when it hangs. Runs until cancelled."""
        await all_of(*(router.keep(note) for router in self.processes), self._watch_leases(membership, note))

    async def _watch_leases(self, membership: Membership, note: Callable[[str], None]) -> None:
        seen_s: dict[int, float] = {}
        while True:
            await asyncio.sleep(_BETWEEN_LOOKS_S)
            try:
                pids = {record.pid for record in await membership.list_routers()}
            except StoreUnavailable:
                seen_s.clear()  # nobody can renew a lease
                continue
            now_s = time.monotonic()
            seen_s |= dict.fromkeys(pids, now_s)
            for router in self.processes:
                if now_s - seen_s.get(router.child.pid, now_s) > _HUNG_S:
                    note(f"{router.name} hangs; killing it")
                    router.child.signal(signal.SIGKILL)
                    del seen_s[router.child.pid]

    async def stop(self) -> None:
        await asyncio.gather(*(router.stop() for router in self.processes))
