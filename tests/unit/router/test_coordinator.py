"""The coordinator and its links, against scripted workers behind real gRPC links and a real membership store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio
import pytest

from router import workers as workers_module
from router.admission import Admission
from router.coordinator import Coordinator
from router.placement import Placement
from router.sequence import SequencePath, SequenceRequest, TokenStep
from router.workers import Charge, Workers
from segue.cache_feed import CacheFeed
from segue.errors import DeadlineExceeded, NoWorker, Overloaded, SegueError, TransferError, WorkerLost
from segue.lifecycle import Phase
from segue.membership import Membership
from segue.sampling import FinishReason, SamplingParams
from segue.v1 import worker_pb2 as pb
from segue.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, Token, WorkerLoad
from segue.v1.transfer_pb2 import Ticket
from segue.v1.worker_pb2_grpc import add_WorkerServiceServicer_to_server
from segue.worker_link import RouterLink, WorkerLinkServicer

Script = Callable[[RouterLink, pb.LinkRequest], None]


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for workers that do not come back."""
    monkeypatch.setattr("router.coordinator.FAILOVER_PATIENCE_S", float("-inf"))
    monkeypatch.setattr("router.coordinator.ARRIVAL_PATIENCE_S", float("-inf"))


@dataclass
class ScriptedLeg:
    """A worker whose answers a test writes."""

    script: Script
    heard: list[str] = field(default_factory=list)
    heard_something: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    dropped: asyncio.Event = field(default_factory=asyncio.Event)
    num_sequences: int = 0

    def handle(self, link: RouterLink, message: pb.LinkRequest) -> None:
        self.heard.append(message.WhichOneof("message") or "")
        self.heard_something.set()
        if message.HasField("cancel"):
            self.cancelled.set()
        self.script(link, message)

    def drop(self, link: RouterLink) -> None:
        self.dropped.set()

    def add_load(self, load: WorkerLoad) -> None:
        load.free_blocks = 5

    async def wait_empty(self) -> None:
        return

    def give_up(self, error: SegueError) -> None:
        return


@dataclass
class ScriptedWorker:
    leg: ScriptedLeg
    record: pb.WorkerRecord
    server: grpc.aio.Server
    servicer: WorkerLinkServicer


@asynccontextmanager
async def scripted_worker(membership: Membership, worker_id: str, script: Script) -> AsyncIterator[ScriptedWorker]:
    role = worker_id.rstrip("0123456789-")
    roles = ["prefill", "decode"] if role == "both" else [role]
    record = pb.WorkerRecord(
        worker_id=worker_id, epoch=await membership.next_epoch(), roles=roles, model="m", total_blocks=100, block_size=16
    )
    leg = ScriptedLeg(script)
    server = grpc.aio.server()
    servicer = WorkerLinkServicer([leg], lambda: record, lambda: WorkerLoad(free_blocks=5), CacheFeed(list), lambda _: None)
    add_WorkerServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    record.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    await membership.announce(record, 60_000)
    try:
        yield ScriptedWorker(leg, record, server, servicer)
    finally:
        await membership.withdraw(record)
        await server.stop(0)


def prefill_script(link: RouterLink, message: pb.LinkRequest) -> None:
    """First token 10 as soon as the ticket is there, or at once when none will come."""
    if message.HasField("attach_tickets") or (message.HasField("start_prefill") and not message.start_prefill.hand_over):
        key = message.attach_tickets.key if message.HasField("attach_tickets") else message.start_prefill.key
        reason = 0 if message.HasField("attach_tickets") else FINISH_REASON_LENGTH
        first = pb.FirstToken(key=key, token=Token(id=10), finish_reason=reason, cached_tokens=3)
        link.send(pb.LinkResponse(first_token=first))
        link.send(pb.LinkResponse(prefill_released=pb.PrefillReleased(key=key)))


def decode_script(link: RouterLink, message: pb.LinkRequest) -> None:
    """Grants a ticket, starts, and sends 11 and 12."""
    if message.HasField("reserve_decode"):
        key = message.reserve_decode.key
        link.send(pb.LinkResponse(decode_reserved=pb.DecodeReserved(key=key, tickets=[Ticket(ticket_id=1)])))
        started = pb.DecodeStarted(key=key, cached_tokens=2, transferred_bytes=99, transport="tcp")
        link.send(pb.LinkResponse(decode_started=started))
        for token_id, reason in ((11, 0), (12, FINISH_REASON_STOP)):
            tokens = pb.SequenceTokens(key=key, tokens=[Token(id=token_id)], finish_reason=reason)
            link.send(pb.LinkResponse(step_tokens=pb.StepTokens(sequences=[tokens])))


def silent(link: RouterLink, message: pb.LinkRequest) -> None:
    """Hears everything and says nothing."""


@asynccontextmanager
async def router(membership: Membership, *, num_workers: int, **options: object) -> AsyncIterator[Coordinator]:
    max_waiting = options.pop("max_waiting", 100)
    values = {"max_attempts": 1, "timeout_s": 30.0} | options
    async with Workers(membership, "router", "m").running() as workers:
        changed = workers.changed.listener()
        while len(workers.available()) < num_workers:
            await changed.wait()
            changed.clear()
        placement = Placement(workers, "least_loaded", may_join=False)
        admission = Admission(workers.fleet, max_active=100, max_waiting=max_waiting, max_wait_s=60)  # type: ignore[arg-type]
        yield Coordinator(workers, placement, admission, "m", **values)  # type: ignore[arg-type]


def request(max_tokens: int = 8) -> SequenceRequest:
    return SequenceRequest("s", (1, 2, 3), SamplingParams(max_tokens=max_tokens))


async def collect(coordinator: Coordinator, path: SequencePath, max_tokens: int = 8) -> list[TokenStep]:
    return [step async for step in coordinator.serve(request(max_tokens), path)]


async def test_a_sequence_goes_through_both_legs(membership: Membership) -> None:
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(scripted_worker(membership, "prefill-0", prefill_script))
        decode = await stack.enter_async_context(scripted_worker(membership, "decode-0", decode_script))
        coordinator = await stack.enter_async_context(router(membership, num_workers=2))
        path = SequencePath()
        steps = await collect(coordinator, path)
        # Decode's tokens may overtake the first one, which comes over another link.
        assert [token.token_id for step in steps for token in step.tokens] == [10, 11, 12]
        assert [step.finish_reason for step in steps] == [None, None, FinishReason.STOP]
        assert path.lifecycle.phase is Phase.FINISHED
        assert (path.prefill_worker, path.decode_worker) == ("prefill-0", "decode-0")
        assert (path.prefill_cached_tokens, path.decode_cached_tokens) == (3, 2)
        assert (path.transferred_bytes, path.transport) == (99, "tcp")
        await prefill.leg.cancelled.wait()
        await decode.leg.cancelled.wait()
        assert prefill.leg.heard == ["start_prefill", "attach_tickets", "cancel"]
        assert decode.leg.heard == ["reserve_decode", "cancel"]
        assert [worker.load.free_blocks for worker in coordinator.status().workers] == [5, 5]
        assert all(link.charged == Charge() for link in coordinator._workers.all())


async def test_one_token_needs_no_decode_worker(membership: Membership) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(scripted_worker(membership, "prefill-0", prefill_script))
        decode = await stack.enter_async_context(scripted_worker(membership, "decode-0", silent))
        coordinator = await stack.enter_async_context(router(membership, num_workers=2))
        path = SequencePath()
        (step,) = await collect(coordinator, path, max_tokens=1)
        assert step.finish_reason is FinishReason.LENGTH
        assert (path.decode_worker, path.transport) == ("", "none")
        assert decode.leg.heard == []


async def test_leaving_early_cancels_both_legs(membership: Membership) -> None:
    def first_token_only(link: RouterLink, message: pb.LinkRequest) -> None:
        if message.HasField("start_prefill"):
            first = pb.FirstToken(key=message.start_prefill.key, token=Token(id=1))
            link.send(pb.LinkResponse(first_token=first))

    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(scripted_worker(membership, "prefill-0", first_token_only))
        decode = await stack.enter_async_context(scripted_worker(membership, "decode-0", silent))
        coordinator = await stack.enter_async_context(router(membership, num_workers=2))
        path = SequencePath()
        async with aclosing(coordinator.serve(request(), path)) as steps:
            await anext(steps)
        assert path.lifecycle.phase is Phase.CANCELLED
        await prefill.leg.cancelled.wait()
        await decode.leg.cancelled.wait()
        assert coordinator.status().active_requests == 0


@pytest.mark.parametrize("failing", ["prefill-0", "decode-0"])
async def test_a_failed_leg_ends_the_sequence_and_cancels_the_other(membership: Membership, failing: str) -> None:
    def fail(link: RouterLink, message: pb.LinkRequest) -> None:
        for name in ("start_prefill", "reserve_decode"):
            if message.HasField(name):  # type: ignore[arg-type]
                link.send_failed(getattr(message, name).key, TransferError("no way through"))

    async with AsyncExitStack() as stack:
        workers = {
            name: await stack.enter_async_context(scripted_worker(membership, name, fail if name == failing else silent))
            for name in ("prefill-0", "decode-0")
        }
        coordinator = await stack.enter_async_context(router(membership, num_workers=2))
        path = SequencePath()
        with pytest.raises(TransferError, match="no way through"):
            await collect(coordinator, path)
        assert path.lifecycle.phase is Phase.FAILED
        for worker in workers.values():
            await worker.leg.cancelled.wait()


async def test_what_decodes_does_not_need_its_prefill_worker(membership: Membership) -> None:
    decode_key: list[tuple[RouterLink, pb.SequenceKey]] = []

    def prefill_then_fail(link: RouterLink, message: pb.LinkRequest) -> None:
        if message.HasField("start_prefill"):
            link.send(pb.LinkResponse(first_token=pb.FirstToken(key=message.start_prefill.key, token=Token(id=10))))

    def start_only(link: RouterLink, message: pb.LinkRequest) -> None:
        if message.HasField("reserve_decode"):
            key = message.reserve_decode.key
            decode_key.append((link, key))
            link.send(pb.LinkResponse(decode_started=pb.DecodeStarted(key=key)))

    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(scripted_worker(membership, "prefill-0", prefill_then_fail))
        await stack.enter_async_context(scripted_worker(membership, "decode-0", start_only))
        coordinator = await stack.enter_async_context(router(membership, num_workers=2))
        changed = coordinator._workers.changed.listener()
        path = SequencePath()
        async with aclosing(coordinator.serve(request(), path)) as steps:
            await anext(steps)
            following = asyncio.ensure_future(anext(steps))
            while path.lifecycle.phase is not Phase.DECODING:  # noqa: ASYNC110 - the events come over sockets
                await asyncio.sleep(0)
            await prefill.server.stop(0)
            while coordinator.missing_roles() != ["prefill"]:
                changed.clear()
                await changed.wait()
            (link, key) = decode_key[0]
            last = pb.SequenceTokens(key=key, tokens=[Token(id=11)], finish_reason=FINISH_REASON_STOP)
            link.send(pb.LinkResponse(step_tokens=pb.StepTokens(sequences=[last])))
            assert (await following).finish_reason is FinishReason.STOP


@pytest.mark.parametrize("lost", ["prefill-0", "decode-0"])
async def test_a_lost_worker_ends_its_sequences_with_a_retryable_error(membership: Membership, lost: str) -> None:
    async with AsyncExitStack() as stack:
        workers = {
            name: await stack.enter_async_context(scripted_worker(membership, name, silent))
            for name in ("prefill-0", "decode-0")
        }
        coordinator = await stack.enter_async_context(router(membership, num_workers=2))
        serving = asyncio.create_task(collect(coordinator, SequencePath()))
        await workers[lost].leg.heard_something.wait()
        await workers[lost].server.stop(0)
        with pytest.raises(WorkerLost, match=lost) as caught:
            await serving
        assert caught.value.retryable
        assert coordinator.missing_roles() == [lost.rstrip("-0")]
        await workers[lost].leg.dropped.wait()


async def test_a_lapsed_lease_ends_the_link(membership: Membership, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.workers.ABSENCE_GRACE_S", 0.0)
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(scripted_worker(membership, "both-0", silent))
        coordinator = await stack.enter_async_context(router(membership, num_workers=1))
        serving = asyncio.create_task(collect(coordinator, SequencePath()))
        await worker.leg.heard_something.wait()
        await membership.withdraw(worker.record)
        with pytest.raises(WorkerLost):
            await serving
        assert coordinator.missing_roles() == ["prefill", "decode"]
        assert coordinator.max_sequence_tokens is None


async def test_a_worker_that_comes_back_serves_as_a_new_epoch(membership: Membership) -> None:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(scripted_worker(membership, "both-0", silent))
        coordinator = await stack.enter_async_context(router(membership, num_workers=1))
        await first.server.stop(0)
        changed = coordinator._workers.changed.listener()
        second = await stack.enter_async_context(scripted_worker(membership, "both-0", prefill_script))
        while [link.record.epoch for link in coordinator._workers.available()] != [second.record.epoch]:
            await changed.wait()
            changed.clear()
        assert len(await collect(coordinator, SequencePath(), max_tokens=1)) == 1


async def test_a_draining_worker_gets_nothing_new(membership: Membership) -> None:
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(scripted_worker(membership, "both-0", silent))
        coordinator = await stack.enter_async_context(router(membership, num_workers=1))
        changed = coordinator._workers.changed.listener()
        worker.record.draining = True
        worker.servicer.tell_changed()
        while coordinator.status().workers[0].state != "drained":
            await changed.wait()
            changed.clear()
        with pytest.raises(NoWorker):
            await collect(coordinator, SequencePath())


@pytest.mark.parametrize(("options", "error"), [({"max_waiting": 0}, Overloaded), ({"timeout_s": 0.05}, DeadlineExceeded)])
async def test_limits(membership: Membership, options: dict[str, float], error: type[SegueError]) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(scripted_worker(membership, "both-0", silent))
        coordinator = await stack.enter_async_context(router(membership, num_workers=1, **options))
        path = SequencePath()
        with pytest.raises(error):
            await collect(coordinator, path)
        assert path.lifecycle.phase is Phase.FAILED


def count_on(link: RouterLink, message: pb.LinkRequest) -> None:
    """Prefill that counts: the next token is the one after the last. Needs no ticket."""
    if message.HasField("start_prefill"):
        start = message.start_prefill
        first = pb.FirstToken(key=start.key, token=Token(id=start.token_ids[-1] + 1))
        link.send(pb.LinkResponse(first_token=first))


async def test_another_attempt_goes_on_where_the_first_stopped(membership: Membership) -> None:
    """A decode worker fails after its second token: prompt and tokens so far are sent to the other one."""
    reserved: list[pb.ReserveDecode] = []
    failures: list[Callable[[], None]] = []

    def two_more(link: RouterLink, message: pb.LinkRequest) -> None:
        if message.HasField("reserve_decode"):
            reserve = message.reserve_decode
            reserved.append(reserve)
            link.send(pb.LinkResponse(decode_started=pb.DecodeStarted(key=reserve.key)))
            for more in (2, 3):
                tokens = pb.SequenceTokens(key=reserve.key, tokens=[Token(id=reserve.token_ids[-1] + more)])
                link.send(pb.LinkResponse(step_tokens=pb.StepTokens(sequences=[tokens])))
            failures.append(lambda: link.send_failed(reserve.key, TransferError(f"damaged in {reserve.key.attempt}")))

    async with AsyncExitStack() as stack:
        await stack.enter_async_context(scripted_worker(membership, "prefill-0", count_on))
        for name in ("decode-0", "decode-1"):
            await stack.enter_async_context(scripted_worker(membership, name, two_more))
        coordinator = await stack.enter_async_context(router(membership, num_workers=3, max_attempts=2))
        path, tokens = SequencePath(), list[int]()

        async def fail_after_every_third_token() -> None:
            async for step in coordinator.serve(request(), path):
                tokens.extend(token.token_id for token in step.tokens)
                if len(tokens) % 3 == 0:
                    failures.pop()()

        with pytest.raises(TransferError, match="all 2 attempts failed, the last one: damaged in 2"):
            await fail_after_every_third_token()
        assert tokens == [4, 5, 6, 7, 8, 9], "nothing is sent twice, nothing is left out"
        again = reserved[1]
        assert (list(again.token_ids), again.num_output_tokens, again.key.attempt) == ([1, 2, 3, 4, 5, 6], 3, 2)
        (failed,) = path.failed_attempts
        assert (failed.prefill_worker, failed.error.message, path.attempts) == ("prefill-0", "damaged in 1", 2)
        assert {failed.decode_worker, path.decode_worker} == {"decode-0", "decode-1"}
        assert all(link.charged == Charge() for link in coordinator._workers.all())


async def test_tokens_that_came_with_the_request_are_not_sent_again(membership: Membership) -> None:
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(scripted_worker(membership, "both-0", prefill_script))
        coordinator = await stack.enter_async_context(router(membership, num_workers=1))
        resumed = SequenceRequest("s", (1, 2, 3), SamplingParams(max_tokens=3), output_token_ids=(4, 5))
        (step,) = [step async for step in coordinator.serve(resumed, SequencePath())]
        assert [token.token_id for token in step.tokens] == [10]
        assert prefill.leg.heard[0] == "start_prefill", "one token is left: no decode worker is needed"


async def test_a_lost_worker_is_waited_for(membership: Membership, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.coordinator.FAILOVER_PATIENCE_S", 60.0)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(scripted_worker(membership, "both-0", silent))
        coordinator = await stack.enter_async_context(router(membership, num_workers=1, max_attempts=2))
        coordinator._workers.last_complete_s = asyncio.get_running_loop().time()
        serving = asyncio.create_task(collect(coordinator, SequencePath(), max_tokens=1))
        await first.leg.heard_something.wait()
        changed = coordinator._workers.changed.listener()
        await first.server.stop(0)
        while coordinator.missing_roles() == []:
            await changed.wait()
            changed.clear()
        await stack.enter_async_context(scripted_worker(membership, "both-0", prefill_script))
        assert len(await serving) == 1


async def test_a_worker_that_says_nothing_is_given_up(membership: Membership, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "TICK_S", 0.005)
    monkeypatch.setattr("segue.worker_link.LOAD_INTERVAL_S", 3600.0)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(scripted_worker(membership, "both-0", silent))
        coordinator = await stack.enter_async_context(router(membership, num_workers=1))
        with pytest.raises(WorkerLost, match="it said nothing for"):
            await collect(coordinator, SequencePath())


async def test_a_worker_whose_step_does_not_end_is_given_up_but_heard_on(
    membership: Membership, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segue.worker_link.LOAD_INTERVAL_S", 3600.0)
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(scripted_worker(membership, "both-0", silent))
        coordinator = await stack.enter_async_context(router(membership, num_workers=1))
        (link,) = coordinator._workers.all()
        serving = asyncio.create_task(collect(coordinator, SequencePath()))
        await worker.leg.heard_something.wait()
        while not link.load.free_blocks:  # noqa: ASYNC110 - the only load that it tells by itself
            await asyncio.sleep(0.001)
        link._deliver(pb.LinkResponse(load=WorkerLoad(step_age_ms=121_000)))
        with pytest.raises(WorkerLost, match="has not ended"):
            await serving
        assert link.is_open
        assert coordinator.missing_roles() == ["prefill", "decode"]
        link._deliver(pb.LinkResponse(load=WorkerLoad()))
        assert coordinator.missing_roles() == []
