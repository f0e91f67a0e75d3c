"""Readiness on a clock of our own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from router.fake import FakeSequenceServer, Script, token_steps
from router.readiness import FRESH_S, Readiness
from segue.errors import NoWorker


@dataclass
class Bench:
    readiness: Readiness
    core: FakeSequenceServer
    now_s: float = 100.0
    last_decoded_s: float | None = None


@asynccontextmanager
async def bench(script: Script, canary_limit_s: float = 30.0) -> AsyncIterator[Bench]:
    core = FakeSequenceServer(script)
    readiness = Readiness(core, 0, lambda: made.last_decoded_s, lambda: made.now_s, canary_limit_s=canary_limit_s)
    made = Bench(readiness, core)
    async with readiness:
        yield made


async def test_a_canary_is_a_greedy_request_of_two_tokens() -> None:
    async with bench(lambda _: token_steps([3, 4])) as b:
        assert (await b.readiness.check()).ready
    [request] = b.core.requests
    assert (request.sampling.max_tokens, request.sampling.is_greedy, request.prompt_token_ids) == (2, True, (0,))


async def test_a_result_holds_for_a_second() -> None:
    async with bench(lambda _: token_steps([3, 4])) as b:
        for moment_s, num_canaries in [(100.0, 1), (100.0 + FRESH_S, 1), (100.1 + FRESH_S, 2)]:
            b.now_s = moment_s
            await b.readiness.check()
            assert len(b.core.requests) == num_canaries


async def test_a_decoded_token_is_proof_enough() -> None:
    async with bench(lambda _: token_steps([3, 4])) as b:
        b.last_decoded_s = b.now_s - FRESH_S
        assert (await b.readiness.check()).ready
        assert not b.core.requests
        b.now_s += 0.1
        assert (await b.readiness.check()).ready
        assert len(b.core.requests) == 1


async def test_one_canary_serves_all_who_ask_and_outlives_one_who_leaves() -> None:
    gate = asyncio.Event()
    async with bench(lambda _: [gate, *token_steps([3, 4])]) as b:
        first, *others = [asyncio.create_task(b.readiness.check()) for _ in range(4)]
        await b.core.until(lambda core: len(core.active) == 1)
        first.cancel()
        gate.set()
        assert all([(await task).ready for task in others])
        assert len(b.core.requests) == 1
        assert not b.core.cancelled


async def test_a_failing_canary_says_why() -> None:
    async with bench(lambda _: [NoWorker("decode-0 has left")]) as b:
        report = await b.readiness.check()
        assert (report.ready, report.reason) == (False, "a canary request failed: decode-0 has left")
    async with bench(lambda _: token_steps([3])) as b:
        assert (await b.readiness.check()).reason == "a canary request got 1 of 2 tokens"


async def test_a_stuck_canary_is_cancelled_at_its_limit() -> None:
    async with bench(lambda _: [asyncio.Event()], canary_limit_s=0.01) as b:
        report = await b.readiness.check()
        assert (report.ready, report.reason) == (False, "a canary request got no answer within 0.01 s")
        assert len(b.core.cancelled) == 1


async def test_missing_roles_are_named_without_a_canary() -> None:
    async with bench(lambda _: token_steps([3, 4])) as b:
        b.core.missing = ["prefill", "decode"]
        b.last_decoded_s = b.now_s
        report = await b.readiness.check()
        assert (report.ready, report.missing_roles) == (False, ("prefill", "decode"))
        assert not b.core.requests


async def test_draining_and_leaving() -> None:
    async with bench(lambda _: [asyncio.Event()]) as b:
        waiting = asyncio.create_task(b.readiness.check())
        await b.core.until(lambda core: len(core.active) == 1)
        b.readiness.drain()
        assert not (await b.readiness.check()).ready
    assert len(b.core.cancelled) == 1
    await asyncio.gather(waiting, return_exceptions=True)
