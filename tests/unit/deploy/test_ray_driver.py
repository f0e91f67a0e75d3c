"""Which replicas are started again, and what is said of those that end. Ray itself runs in test_launch."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.driver_events import DriverEvents
from deploy.driver_plan import DriverPlan
from deploy.ray_driver import Supervisor
from deploy.replica import Outcome
from segue.config import WorkerSettings
from segue.errors import ConfigError, Unavailable


class FakeRay:
    """As much of the `ray` module as the supervisor uses; each run of a replica takes the next of `outcomes`; None:
    it goes on."""

    class RayError(Exception):
        pass

    def __init__(self, outcomes: Sequence[Outcome | Exception | None]) -> None:
        self.exceptions = SimpleNamespace(RayError=self.RayError)
        self.placements: list[tuple[list[dict[str, int]], str]] = []
        self.num_removed_placements = 0
        self.util = SimpleNamespace(
            placement_group=self._placement_group,
            remove_placement_group=self._remove_placement_group,
            scheduling_strategies=SimpleNamespace(PlacementGroupSchedulingStrategy=self._in_placement),
        )
        self.options: list[dict[str, Any]] = []
        self.started: list[WorkerSettings] = []
        self.killed: list[Any] = []
        self.first_kill = asyncio.Event()
        self._outcomes = list(outcomes)
        self.is_full = False
        self.num_decode_nodes = 0

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        self.options.append(options)
        return lambda _class: SimpleNamespace(remote=self._start)

    def _start(self, settings: str, _spread: bool) -> Any:
        self.started.append(WorkerSettings.model_validate_json(settings))
        ready = asyncio.get_running_loop().create_future()
        if not self.is_full:
            ready.set_result(None)
        return SimpleNamespace(
            run=SimpleNamespace(remote=lambda _entry: self._run()), __ray_ready__=SimpleNamespace(remote=lambda: ready)
        )

    def _run(self) -> Awaitable[Outcome]:
        run = asyncio.get_running_loop().create_future()
        if self._outcomes:
            outcome = self._outcomes.pop(0)
            if isinstance(outcome, Exception):
                run.set_exception(outcome)
            elif outcome is not None:
                run.set_result(outcome)
        else:  # it serves
            os.kill(os.getpid(), signal.SIGTERM)
        return run

    def _placement_group(self, bundles: list[dict[str, int]], strategy: str) -> Any:
        self.placements.append((bundles, strategy))
        ready = asyncio.get_running_loop().create_future()
        ready.set_result(None)
        return SimpleNamespace(ready=lambda: ready)

    def _remove_placement_group(self, _placement: Any) -> None:
        self.num_removed_placements += 1

    def _in_placement(self, _placement: Any, placement_group_bundle_index: int) -> int:
        return placement_group_bundle_index

    def kill(self, actor: Any) -> None:
        self.killed.append(actor)
        self.first_kill.set()

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 9.0, "segue_slot": 10.0, "decode_node": self.num_decode_nodes}

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 1.0}

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address="here:1")


def plan(*, threads: int = 2, spread: bool = False, **further: Any) -> DriverPlan:
    worker = WorkerSettings(
        cluster_id="c",
        redis="redis://127.0.0.1:1",
        worker_id="decode-0",
        model_dir=Path("/m"),
        model_name="m",
        threads=threads,
        **{"roles": ("decode",)} | further,
    )
    return DriverPlan("c", "", "module:function", (worker.model_dump_json(),), spread)


@pytest.fixture(autouse=True)
async def _quick_and_without_traces(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setattr("deploy.ray_driver._FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr("deploy.ray_driver._LOOK_EVERY_S", 0.0)
    yield
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(number)


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


async def test_a_replica_that_gave_up_is_started_again_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    ray = FakeRay([Outcome(drained=False, again=True, code="config", error="bad")])
    ray._outcomes.append(ray.RayError("a bug"))
    await Supervisor(ray, plan()).run()  # the third run serves, and the fake then asks to stop
    said = events(capsys.readouterr().out)
    assert said[0] == {"event": "serving", "address": "here:1"}
    assert [(event["drained"], event["code"], event["error"]) for event in said[1:]] == [
        (False, "config", "bad"),
        (False, "internal", "a bug"),
    ]
    assert len(ray.started) == 3
    assert len(ray.killed) == 3  # also the one that served


async def test_ray_restarts_what_dies_and_a_local_ray_has_a_slot_for_every_replica() -> None:
    ray = FakeRay([])
    await Supervisor(ray, plan(threads=4)).run()
    (options,) = ray.options
    assert (options["max_restarts"], options["max_task_retries"], options["max_concurrency"]) == (-1, -1, 1)
    assert (options["num_cpus"], options["resources"]) == (0, {"segue_slot": 1})
    assert ray.started[0].threads == 4


async def test_a_replica_that_drained_is_let_go(capsys: pytest.CaptureFixture[str]) -> None:
    ray = FakeRay([Outcome(drained=True, again=False, code="", error="")])
    supervising = asyncio.create_task(Supervisor(ray, plan()).run())
    await ray.first_kill.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    await supervising
    assert len(ray.started) == 1
    assert events(capsys.readouterr().out)[1]["drained"] is True


async def test_on_a_ray_cluster_a_replica_asks_for_the_cores_it_keeps_busy() -> None:
    ray = FakeRay([])
    await Supervisor(ray, replace(plan(threads=0, spread=True), ray_address="head:1")).run()
    (options,) = ray.options
    assert (options["num_cpus"], options["scheduling_strategy"]) == (9, "SPREAD")
    assert ray.started[0].threads == 9


async def test_ranks_start_and_end_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    ray = FakeRay([None])
    ray._outcomes += [ray.RayError("the process died"), None]
    await Supervisor(ray, plan(decode_tp=3)).run()  # the second time all serve, and the fake then asks to stop
    assert [worker.rank for worker in ray.started] == [0, 1, 2, 0, 1, 2]
    groups = [worker.group for worker in ray.started]
    assert groups[:3] == groups[:1] * 3
    assert groups[3:] == groups[3:4] * 3
    assert groups[0] != groups[3], "no rank of an earlier start may come in"
    assert len(ray.killed) == 6
    assert (ray.placements, ray.num_removed_placements) == ([([{"segue_slot": 1}] * 3, "STRICT_PACK")] * 2, 2)
    assert [options["scheduling_strategy"] for options in ray.options] == [0, 1, 2] * 2
    assert {options["max_restarts"] for options in ray.options} == {0}
    (_, ended) = events(capsys.readouterr().out)
    assert (ended["drained"], ended["error"]) == (False, "the process died")


async def test_ranks_that_drained_are_let_go(capsys: pytest.CaptureFixture[str]) -> None:
    ray = FakeRay([Outcome(drained=True, again=False, code="", error=""), None])
    supervising = asyncio.create_task(Supervisor(ray, plan(decode_tp=2)).run())
    await ray.first_kill.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    await supervising
    assert len(ray.started) == len(ray.killed) == 2
    assert events(capsys.readouterr().out)[1]["drained"] is True


async def test_each_rank_of_several_has_a_gpu_of_its_own() -> None:
    ray = FakeRay([])
    roles = {"roles": ("prefill", "decode"), "device": "cuda"}
    supervisor = Supervisor(ray, replace(plan(spread=True, prefill_tp=2, **roles), ray_address="head:1"))
    (worker,) = supervisor._workers
    assert supervisor._resources(worker) == {"CPU": 2, "GPU": 1}
    assert supervisor._resources(worker.model_copy(update={"prefill_tp": 1})) == {"CPU": 2}


async def test_each_role_takes_the_custom_resources_of_its_nodes() -> None:
    both = replace(plan(), ray_address="head:1", prefill_resources={"prefill_node": 1.0}, decode_resources={"decode_node": 0.5})
    assert DriverPlan.from_json(both.to_json()) == both
    supervisor = Supervisor(FakeRay([]), both)
    (worker,) = supervisor._workers
    assert supervisor._resources(worker) == {"CPU": 1, "decode_node": 0.5}
    assert supervisor._resources(worker.model_copy(update={"roles": ("prefill",)})) == {"CPU": 1, "prefill_node": 1.0}
    supervisor._start(worker)
    assert supervisor._ray.options[-1]["resources"] == {"decode_node": 0.5}


async def test_replicas_are_added_and_ended_and_those_without_room_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay([None, None])
    supervisor = Supervisor(ray, replace(plan(spread=True), ray_address="head:1", decode_resources={"decode_node": 1.0}))
    ray.is_full = True
    supervisor.start("decode-7")
    supervisor.start("decode-8")
    await asyncio.sleep(0)
    assert [worker.worker_id for worker in ray.started] == ["decode-7", "decode-8"]
    assert set(supervisor.running) == {"decode-7", "decode-8"}
    assert supervisor.what_is_missing(["decode-7", "decode-9"]) == (
        "Ray has no room yet for decode-7: all 2 workers take 2 decode_node, and the whole cluster has 0 decode_node; "
        "add nodes, or ask for fewer workers"
    )
    ray.num_decode_nodes = 2
    assert supervisor.what_is_missing(["decode-7"]) == "", "it may just be starting"
    monkeypatch.setattr("deploy.ray_driver._PATIENCE_S", 0.0)
    assert supervisor.what_is_missing(["decode-7"]) == (
        "Ray has no room yet for decode-7: it takes 1 decode_node, 2 CPU, and free in the whole cluster are "
        "0 of 2 decode_node, 1 of 9 CPU; add nodes, or ask for fewer workers"
    )
    supervisor.end("decode-7")
    await ray.first_kill.wait()
    await asyncio.sleep(0)
    assert set(supervisor.running) == {"decode-8"}
    supervisor.end("decode-8")


async def test_what_there_is_no_room_for_is_told_once_and_that_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    ray = FakeRay([None])
    ray.is_full = True
    supervisor = Supervisor(ray, replace(plan(spread=True), ray_address="head:1", decode_resources={"decode_node": 1.0}))
    supervisor.start("decode-0")
    heard = DriverEvents()

    async def until(problem: str) -> None:
        said = ""
        while not any(event["problem"].startswith(problem) for event in events(said)):
            await asyncio.sleep(0)
            said += capsys.readouterr().out
        for line in said.splitlines():
            heard.on_line(line)

    telling = asyncio.create_task(supervisor._tell_of_room())
    await until("Ray has no room yet for decode-0")
    assert "1 decode_node" in heard.problem
    ray.num_decode_nodes = 1
    await until("")
    assert heard.problem == ""
    telling.cancel()
    supervisor.end("decode-0")
    await ray.first_kill.wait()


async def test_the_launcher_hears_what_the_driver_says() -> None:
    heard = DriverEvents()
    ended = {"event": "replica_ended", "worker_id": "decode-0"}
    heard.on_line("some noise")
    heard.on_line(json.dumps({**ended, "drained": False, "again": True, "code": "config", "error": "bad"}))
    for again in (True, False):
        heard.on_line(json.dumps({**ended, "drained": True, "again": again, "code": "", "error": ""}))
    failed = await heard.next_ended()
    assert isinstance(failed.error, ConfigError)
    notes = [failed.note(), (await heard.next_ended()).note(), (await heard.next_ended()).note()]
    assert notes == ["decode-0: bad; starting it again", "decode-0 drained and is started anew", "decode-0 drained and left"]


async def test_a_start_cannot_go_without_any_replica() -> None:
    heard = DriverEvents()
    ended = {"event": "replica_ended", "worker_id": "decode-0", "drained": True, "again": False, "code": "", "error": ""}
    heard.on_line(json.dumps(ended))
    with pytest.raises(Unavailable, match="decode-0 was told to leave"):
        await heard.raise_failures()
