"""A worker's roles and draining, without a worker."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from deploy.duty import Duty
from segue.config import WorkerSettings
from segue.errors import SegueError, WorkerLost
from segue.v1 import worker_pb2 as pb
from segue.v1.inference_pb2 import WorkerLoad
from segue.worker_link import RouterLink


class FakeLeg:
    def __init__(self) -> None:
        self.num_sequences = 1
        self.given_up: list[SegueError] = []
        self.asked = asyncio.Event()
        self.empty = asyncio.Event()

    def handle(self, link: RouterLink, message: pb.LinkRequest) -> None: ...

    def drop(self, link: RouterLink) -> None: ...

    def add_load(self, load: WorkerLoad) -> None: ...

    async def wait_empty(self) -> None:
        self.asked.set()
        await self.empty.wait()

    def give_up(self, error: SegueError) -> None:
        self.given_up.append(error)
        self.empty.set()


def settings(**changes: Any) -> WorkerSettings:
    fields = {"cluster_id": "c", "redis": "r", "worker_id": "decode-0", "model_dir": Path("/m"), "model_name": "m"}
    return WorkerSettings.model_validate(fields | {"roles": ("decode",)} | changes)


def told(**message: Any) -> pb.LinkRequest:
    return pb.LinkRequest(**message)


@pytest.fixture
async def leg() -> FakeLeg:
    return FakeLeg()


@pytest.fixture
async def duty(leg: FakeLeg) -> Duty:
    return Duty(settings(), [leg])


async def test_it_leaves_when_it_holds_nothing(leg: FakeLeg, duty: Duty) -> None:
    changes = []
    duty.on_change = lambda: changes.append(duty.draining)
    duty.handle(told(drain=pb.DrainWorker(grace_ms=60_000, departure=pb.DEPARTURE_RESTART)))
    assert changes == [True]
    await leg.asked.wait()
    assert not duty.departure.done()
    leg.empty.set()
    assert await duty.departure == pb.DEPARTURE_RESTART
    assert leg.given_up == []
    duty.handle(told(drain=pb.DrainWorker(undo=True)))
    assert duty.draining, "it is too late"


async def test_after_the_grace_it_gives_up_what_is_left(leg: FakeLeg, duty: Duty) -> None:
    duty.handle(told(drain=pb.DrainWorker(grace_ms=0, departure=pb.DEPARTURE_LEAVE)))
    assert await duty.departure == pb.DEPARTURE_LEAVE
    (error,) = leg.given_up
    assert isinstance(error, WorkerLost)
    assert error.retryable


async def test_the_last_word_holds(leg: FakeLeg, duty: Duty) -> None:
    duty.handle(told(drain=pb.DrainWorker(grace_ms=60_000, departure=pb.DEPARTURE_LEAVE)))
    await leg.asked.wait()
    duty.handle(told(drain=pb.DrainWorker(undo=True)))
    assert not duty.draining
    leg.empty.set()
    duty.handle(told(drain=pb.DrainWorker(grace_ms=60_000)))
    await asyncio.sleep(0.01)
    assert duty.draining
    assert not duty.departure.done(), "it stays, without work"


async def test_a_role_is_a_lease(duty: Duty) -> None:
    changed = asyncio.Event()
    duty.on_change = changed.set
    duty.handle(told(set_role=pb.SetRole(role="prefill", lease_ms=3_600_000)))
    assert (duty.roles, duty.roles_until_unix_s > 0) == (("prefill",), True)
    duty.handle(told(set_role=pb.SetRole(role="prefill", lease_ms=1)))
    changed.clear()
    await changed.wait()
    assert (duty.roles, duty.roles_until_unix_s) == (("decode",), 0.0)
    duty.handle(told(set_role=pb.SetRole(role="prefill", lease_ms=3_600_000)))
    duty.handle(told(set_role=pb.SetRole(role="decode", lease_ms=1)))
    assert (duty.roles, duty.roles_until_unix_s) == (("decode",), 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"decode_quantization": "int8"},
        {"decode_block_size": 16},
        {"decode_kv_dtype": "bfloat16"},
        {"decode_tp": 2},
    ],
)
async def test_what_is_loaded_for_one_role_stays_with_it(leg: FakeLeg, changes: dict[str, object]) -> None:
    own = settings(**changes)
    assert own.possible_roles == ("decode",)
    assert settings(**changes, roles=("prefill",)).possible_roles == ("prefill",)
    duty = Duty(own, [leg])
    duty.handle(told(set_role=pb.SetRole(role="prefill", lease_ms=1000)))
    assert duty.roles == ("decode",)


def test_what_is_loaded_alike_can_be_either() -> None:
    assert settings().possible_roles == ("prefill", "decode")
    assert settings(quantization="int8", decode_quantization="int8").possible_roles == ("prefill", "decode")
