"""What OperatorService asks of the core, and what the core refuses before any worker hears of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from router.fake import token_steps
from router.operations import Operations
from segue.client import AsyncClient
from segue.errors import InvalidRequest, RequestError, WorkerLost
from segue.v1 import worker_pb2

from .conftest import ServeFront


async def test_each_call_reaches_the_operator(serve: ServeFront) -> None:
    async with serve(lambda _: token_steps([5])) as running, AsyncClient(running.front.grpc_address) as client:
        assert (await client.drain_worker("decode-0")).state == "draining"
        await client.drain_worker("decode-0", grace_s=0.0, force=True)
        assert (await client.drain_worker("decode-0", undo=True)).state == "ready"
        await client.restart_worker("decode-0", grace_s=5.0)
        assert (await client.set_worker_role("decode-0", "prefill", lease_s=60.0)).roles == ("prefill",)
        assert (await client.scale_workers(decode=3)).starting == ("decode-1",)
        with pytest.raises(RequestError, match="has served no request yet"):
            await client.explain()
        assert running.operator.asked == [
            ("drain", "decode-0", 60.0, worker_pb2.DEPARTURE_UNSPECIFIED, False),
            ("drain", "decode-0", 0.0, worker_pb2.DEPARTURE_UNSPECIFIED, True),
            ("take_back", "decode-0"),
            ("drain", "decode-0", 5.0, worker_pb2.DEPARTURE_RESTART, False),
            ("set_role", "decode-0", "prefill", 60.0, False),
            ("scale", None, 3),
        ]


class FakeLink:
    def __init__(self, worker_id: str, role: str, *, is_open: bool = True, possible: tuple[str, ...] = ("prefill", "decode")):
        self.record = worker_pb2.WorkerRecord(worker_id=worker_id, roles=[role], possible_roles=possible)
        self.is_open = is_open
        self.name = worker_id

    def send(self, message: object) -> None:
        raise AssertionError(f"{self.name} was asked: {message}")


def operations(*links: FakeLink) -> Operations:
    workers: Any = SimpleNamespace(all=lambda: list(links), available=lambda: [link for link in links if link.is_open])
    return Operations(workers, None)  # type: ignore[arg-type]  # nothing is scaled


async def test_what_is_refused() -> None:
    fixed = FakeLink("decode-1", "decode", possible=("decode",))
    operator = operations(FakeLink("prefill-0", "prefill"), fixed, FakeLink("decode-0", "decode", is_open=False))
    with pytest.raises(InvalidRequest, match="there is no worker 'x'; there are: decode-0, decode-1, prefill-0"):
        await operator.take_back("x")
    with pytest.raises(WorkerLost, match="cannot be reached"):
        await operator.take_back("decode-0")
    with pytest.raises(InvalidRequest, match="prefill-0 is the only ready prefill worker"):
        await operator.drain("prefill-0", 1.0, worker_pb2.DEPARTURE_RESTART, force=False)
    with pytest.raises(InvalidRequest, match="decode-1 can only be decode: its weights, KV cache or number of ranks"):
        await operator.set_role("decode-1", "prefill", 60.0, force=True)
    with pytest.raises(InvalidRequest, match="role: must be prefill or decode, not 'both'"):
        await operator.set_role("decode-1", "both", 60.0, force=True)
    with pytest.raises(InvalidRequest, match="prefill-0 is the only ready prefill worker"):
        await operator.set_role("prefill-0", "decode", 60.0, force=False)
    for grace_s in (-1.0, float("nan"), 1e9):
        with pytest.raises(InvalidRequest, match="grace_s"):
            await operator.drain("decode-1", grace_s, worker_pb2.DEPARTURE_UNSPECIFIED, force=True)
    for lease_s in (0.0, float("nan"), float("inf")):
        with pytest.raises(InvalidRequest, match="lease_s"):
            await operator.set_role("prefill-0", "decode", lease_s, force=True)
