"""What operators ask of workers, sent over this router's links. A worker that was asked says itself what it has become."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from router.workers import WorkerLink, Workers
from segue.config import MAX_POOL
from segue.errors import DeadlineExceeded, InvalidRequest, RequestError, WorkerLost
from segue.pools import PoolStore
from segue.v1 import inference_pb2, operator_pb2, worker_pb2

DEFAULT_GRACE_S = 60.0
_MAX_GRACE_S = 24 * 3600.0
_MIN_LEASE_S, _MAX_LEASE_S = 1.0, 30 * 24 * 3600.0
_ANSWER_LIMIT_S = 10.0


class Operator(Protocol):
    """Every method raises InvalidRequest for what cannot be done, and WorkerLost or DeadlineExceeded when the worker does not
    answer. `force`: also when no other ready worker has the role that is given up."""

    async def drain(
        self, worker_id: str, grace_s: float, departure: worker_pb2.Departure.ValueType, *, force: bool
    ) -> inference_pb2.WorkerStatus:
        """Returns when the worker takes nothing new any more."""

    async def take_back(self, worker_id: str) -> inference_pb2.WorkerStatus:
        """Undoes a drain."""

    async def set_role(self, worker_id: str, role: str, lease_s: float, *, force: bool) -> inference_pb2.WorkerStatus:
        """Returns when the worker has the role. `lease_s` is without meaning for its own."""

    async def scale(self, prefill: int | None, decode: int | None) -> operator_pb2.ScaleWorkersResponse:
        """None: as many as before. Raises RequestError where nobody follows, StoreUnavailable when the store is away."""


class Operations:
    """Implements Operator."""

    def __init__(self, workers: Workers, pools: PoolStore) -> None:
        self._workers = workers
        self._pools = pools

    async def drain(
        self, worker_id: str, grace_s: float, departure: worker_pb2.Departure.ValueType, *, force: bool
    ) -> inference_pb2.WorkerStatus:
        if not 0 <= grace_s <= _MAX_GRACE_S:
            raise InvalidRequest("grace_s", f"must be 0 to {_MAX_GRACE_S:g}, not {grace_s:g}")
        link = self._link(worker_id)
        if not force:
            self._check_others(link, link.record.roles, "drains")
        drain = worker_pb2.DrainWorker(grace_ms=int(grace_s * 1000), departure=departure)
        return await self._ask(link, worker_pb2.LinkRequest(drain=drain), lambda record: record.draining)

    async def take_back(self, worker_id: str) -> inference_pb2.WorkerStatus:
        drain = worker_pb2.DrainWorker(undo=True)
        return await self._ask(self._link(worker_id), worker_pb2.LinkRequest(drain=drain), lambda record: not record.draining)

    async def set_role(self, worker_id: str, role: str, lease_s: float, *, force: bool) -> inference_pb2.WorkerStatus:
        link = self._link(worker_id)
        if role not in ("prefill", "decode"):
            raise InvalidRequest("role", f"must be prefill or decode, not {role[:100]!r}")
        if role not in link.record.possible_roles:
            can_be = " or ".join(link.record.possible_roles)
            raise InvalidRequest(
                "role",
                f"{worker_id} can only be {can_be}: its weights, KV cache or number of ranks differ from a {role} worker's",
            )
        if not _MIN_LEASE_S <= lease_s <= _MAX_LEASE_S:
            raise InvalidRequest("lease_s", f"must be {_MIN_LEASE_S:g} to {_MAX_LEASE_S:g}, not {lease_s:g}")
        if not force:
            self._check_others(link, [given_up for given_up in link.record.roles if given_up != role], f"becomes {role}")
        set_role = worker_pb2.SetRole(role=role, lease_ms=int(lease_s * 1000))
        return await self._ask(link, worker_pb2.LinkRequest(set_role=set_role), lambda record: list(record.roles) == [role])

    async def scale(self, prefill: int | None, decode: int | None) -> operator_pb2.ScaleWorkersResponse:
        for field, number in (("prefill", prefill), ("decode", decode)):
            if number is not None and not 1 <= number <= MAX_POOL:
                raise InvalidRequest(field, f"must be 1 to {MAX_POOL}, not {number}")
        if (report := await self._pools.report()) is None:
            raise RequestError(
                "nobody follows who could start or end workers: with separate pools, segue up does. On Kubernetes scale the "
                "pools there (kubectl scale, or the chart's autoscaling)"
            )
        wanted = await self._pools.wanted() or report.wanted
        if prefill is not None or decode is not None:
            wanted = await self._pools.ask(prefill or wanted.prefill, decode or wanted.decode)
        is_done = report.wanted.revision == wanted.revision and not (report.starting or report.leaving)
        return operator_pb2.ScaleWorkersResponse(
            prefill=wanted.prefill,
            decode=wanted.decode,
            done=is_done,
            starting=report.starting,
            leaving=report.leaving,
            problem=report.problem,
        )

    def _link(self, worker_id: str) -> WorkerLink:
        links = {link.record.worker_id: link for link in self._workers.all()}
        if (link := links.get(worker_id)) is None:
            names = ", ".join(sorted(links)) or "none"
            raise InvalidRequest("worker_id", f"there is no worker {worker_id[:100]!r}; there are: {names}")
        if not link.is_open:
            raise WorkerLost(f"worker {link.name} cannot be reached")
        return link

    def _check_others(self, link: WorkerLink, roles: Sequence[str], what: str) -> None:
        others = {role for other in self._workers.available() if other is not link for role in other.record.roles}
        if missing := [role for role in roles if role not in others]:
            raise InvalidRequest(
                "worker_id",
                f"{link.record.worker_id} is the only ready {' and '.join(missing)} worker: requests would fail once it "
                f"{what}; add another first, or force it",
            )

    async def _ask(
        self, link: WorkerLink, message: worker_pb2.LinkRequest, holds: Callable[[worker_pb2.WorkerRecord], bool]
    ) -> inference_pb2.WorkerStatus:
        """Sends `message` and waits until what the worker says of itself `holds`."""
        num_before = link.num_changes
        with self._workers.changed.listening() as changed:
            link.send(message)
            try:
                async with asyncio.timeout(_ANSWER_LIMIT_S):
                    while link.is_open and not (link.num_changes > num_before and holds(link.record)):
                        await changed.wait()
                        changed.clear()
            except TimeoutError:
                raise DeadlineExceeded(f"worker {link.name} did not answer within {_ANSWER_LIMIT_S:g} s") from None
        # One that had nothing to finish may be gone already, as it was told.
        if not link.is_open and not message.drain.departure:
            raise WorkerLost(f"worker {link.name} was lost before it answered")
        return link.status()
