"""Workers that compute nothing and take a set time for it, behind real links: so that a router can be measured alone.

A process of its own (`fake_workers(...)` starts it). A prefill worker takes prompts one after the other, `prefill_ms_per_token`
for each token; a decode worker all sequences together, one token for each in `step_ms`.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc.aio

from deploy.child import Child, FirstWord
from segue.cache_feed import CacheFeed
from segue.membership import Membership, held_lease
from segue.runtime import background, run_process, say_serving, stop_event
from segue.v1 import worker_pb2 as pb
from segue.v1.inference_pb2 import FINISH_REASON_LENGTH, Token, WorkerLoad
from segue.v1.worker_pb2_grpc import add_WorkerServiceServicer_to_server
from segue.worker_link import LINK_OPTIONS, RouterLink, SequenceId, WorkerLinkServicer, sequence_id

_PLAN = "SEGUE_FAKE_WORKERS"
_LEASE_MS = 3000
_STOP_S = 2.0


@dataclass(frozen=True, slots=True)
class FakePlan:
    cluster_id: str
    redis: str
    model: str
    prefill: int = 1
    decode: int = 1
    prefill_ms_per_token: float = 0.0
    # 0: as fast as it goes.
    step_ms: float = 0.0
    # Sequences that one worker decodes at a time; more wait for a ticket.
    max_sequences: int = 1000


@dataclass(eq=False, slots=True)
class _Sequence:
    key: pb.SequenceKey
    link: RouterLink
    num_prompt_tokens: int
    num_left: int


class FakePrefill:
    def __init__(self, plan: FakePlan) -> None:
        self._plan = plan
        self._waiting: asyncio.Queue[_Sequence] = asyncio.Queue()
        self._alive: dict[SequenceId, _Sequence] = {}
        self._queued_tokens = 0

    def handle(self, link: RouterLink, message: pb.LinkRequest) -> None:
        if message.HasField("start_prefill"):
            start = message.start_prefill
            sequence = _Sequence(start.key, link, len(start.token_ids), start.sampling.max_tokens)
            self._alive[sequence_id(start.key)] = sequence
            self._queued_tokens += sequence.num_prompt_tokens
            self._waiting.put_nowait(sequence)
        elif message.HasField("cancel"):
            self._alive.pop(sequence_id(message.cancel.key), None)

    async def run(self) -> None:
        loop, due_s = asyncio.get_running_loop(), 0.0
        while True:
            sequence = await self._waiting.get()
            if sequence_id(sequence.key) in self._alive:
                # By the clock, so that timers that fire late do not add up.
                due_s = max(due_s, loop.time()) + sequence.num_prompt_tokens * self._plan.prefill_ms_per_token / 1000
                if due_s > loop.time():
                    await asyncio.sleep(due_s - loop.time())
                reason = FINISH_REASON_LENGTH if sequence.num_left == 1 else 0
                first = pb.FirstToken(key=sequence.key, token=Token(id=1), finish_reason=reason)  # type: ignore[arg-type]
                sequence.link.send(pb.LinkResponse(first_token=first))
            self._queued_tokens -= sequence.num_prompt_tokens

    def drop(self, link: RouterLink) -> None:
        for key, sequence in list(self._alive.items()):
            if sequence.link is link:
                del self._alive[key]

    def add_load(self, load: WorkerLoad) -> None:
        load.queued_tokens = self._queued_tokens
        load.prefill_ms_per_token = self._plan.prefill_ms_per_token

    @property
    def num_sequences(self) -> int:
        return len(self._alive)

    async def wait_empty(self) -> None:
        return


class FakeDecode:
    """Knows nothing of prefill: a sequence starts as soon as its ticket is out, and the router holds its tokens back until the
    first one is there."""

    def __init__(self, plan: FakePlan) -> None:
        self._plan = plan
        self._running: dict[SequenceId, _Sequence] = {}
        self._waiting: dict[SequenceId, _Sequence] = {}
        self._wake = asyncio.Event()

    def handle(self, link: RouterLink, message: pb.LinkRequest) -> None:
        if message.HasField("reserve_decode"):
            reserve = message.reserve_decode
            num_left = reserve.sampling.max_tokens - 1
            self._waiting[sequence_id(reserve.key)] = _Sequence(reserve.key, link, len(reserve.token_ids), num_left)
            self._admit()
        elif message.HasField("cancel"):
            for sequences in (self._running, self._waiting):
                sequences.pop(sequence_id(message.cancel.key), None)
            self._admit()

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._plan.max_sequences:
            key = next(iter(self._waiting))
            sequence = self._running[key] = self._waiting.pop(key)
            sequence.link.send(pb.LinkResponse(decode_reserved=pb.DecodeReserved(key=sequence.key)))
            sequence.link.send(pb.LinkResponse(decode_started=pb.DecodeStarted(key=sequence.key, transport="shm")))
            self._wake.set()

    async def run(self) -> None:
        while True:
            if not self._running:
                self._wake.clear()
                await self._wake.wait()
            await asyncio.sleep(self._plan.step_ms / 1000)
            messages: dict[RouterLink, pb.StepTokens] = {}
            for key, sequence in list(self._running.items()):
                sequence.num_left -= 1
                reason = FINISH_REASON_LENGTH if not sequence.num_left else 0
                messages.setdefault(sequence.link, pb.StepTokens()).sequences.add(
                    key=sequence.key,
                    tokens=[Token(id=2)],
                    finish_reason=reason,
                )
                if not sequence.num_left:
                    del self._running[key]
            for link, message in messages.items():
                link.send(pb.LinkResponse(step_tokens=message))
            self._admit()

    def drop(self, link: RouterLink) -> None:
        for sequences in (self._running, self._waiting):
            for key, sequence in list(sequences.items()):
                if sequence.link is link:
                    del sequences[key]

    def add_load(self, load: WorkerLoad) -> None:
        load.decode_sequences = len(self._running) + len(self._waiting)
        load.free_blocks = load.total_blocks = 10**6
        load.decode_ms_per_step = max(self._plan.step_ms, 0.01)

    @property
    def num_sequences(self) -> int:
        return len(self._running) + len(self._waiting)

    async def wait_empty(self) -> None:
        return


@asynccontextmanager
async def fake_workers(plan: FakePlan, log: Path) -> AsyncIterator[Child]:
    """The process, which serves until the block ends."""
    said = FirstWord()
    env = {_PLAN: json.dumps(asdict(plan))}
    child = await Child.start(
        "fake workers", (sys.executable, "-m", "bench.fake_workers"), log=log, env=env, on_line=said.on_line
    )
    try:
        await said.of(child)
        yield child
    finally:
        await child.stop(_STOP_S)


@asynccontextmanager
async def _serving(plan: FakePlan, membership: Membership, worker_id: str, role: str) -> AsyncIterator[None]:
    leg = FakePrefill(plan) if role == "prefill" else FakeDecode(plan)
    record = pb.WorkerRecord(
        worker_id=worker_id,
        epoch=await membership.next_epoch(),
        roles=[role],
        model=plan.model,
        pid=os.getpid(),
        host=socket.gethostname(),
        layout_fingerprint="fake",
        total_blocks=10**6,
        block_size=32,
    )

    def load() -> WorkerLoad:
        said = WorkerLoad()
        leg.add_load(said)
        return said

    server = grpc.aio.server(options=LINK_OPTIONS)
    add_WorkerServiceServicer_to_server(WorkerLinkServicer([leg], lambda: record, load, CacheFeed(list)), server)
    record.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with background(leg.run()), held_lease(membership, lambda: record, _LEASE_MS):
            yield
    finally:
        await server.stop(None)


async def main() -> None:
    plan, stop = FakePlan(**json.loads(os.environ[_PLAN])), stop_event()
    async with AsyncExitStack() as stack:
        membership = await stack.enter_async_context(Membership(plan.redis, plan.cluster_id))
        for role, count in (("prefill", plan.prefill), ("decode", plan.decode)):
            for number in range(count):
                await stack.enter_async_context(_serving(plan, membership, f"{role}-{number}", role))
        say_serving(workers=str(plan.prefill + plan.decode))
        with suppress(asyncio.CancelledError):
            await stop.wait()


if __name__ == "__main__":
    sys.exit(run_process(main))
