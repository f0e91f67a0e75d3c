from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass, field

import pytest

from segue.jobs import JobTable
from segue.logs import JsonFormatter
from segue.v1 import worker_pb2 as pb
from segue.worker_link import RouterLink


@dataclass(eq=False)
class FakeJob:
    key: pb.SequenceKey
    link: RouterLink
    traceparent: str = ""
    released: list[str] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self) -> None:
        await self.gate.wait()

    async def release(self, job: FakeJob) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        self.released.append("released")


def make_job(name: str = "a", link: RouterLink | None = None) -> FakeJob:
    return FakeJob(pb.SequenceKey(sequence_id=name, attempt=1), link or RouterLink("r"))


async def test_a_job_ends_by_itself_and_the_table_is_empty() -> None:
    table: JobTable[FakeJob] = JobTable()
    job = make_job()
    table.start(job, job.serve(), job.release)
    assert len(table) == 1
    assert table.get(job.key) is job
    job.gate.set()
    await table.wait_empty()
    assert (len(table), job.released, table.get(job.key)) == (0, ["released"], None)


async def test_a_job_cancelled_before_its_first_step_still_cleans_up() -> None:
    table: JobTable[FakeJob] = JobTable()
    job = make_job()
    table.start(job, job.serve(), job.release)
    table.cancel(job.key)
    await table.wait_empty()
    assert job.released == ["released"]


@pytest.mark.parametrize("ends_by_itself", [True, False])
async def test_a_release_is_never_interrupted(ends_by_itself: bool) -> None:
    table: JobTable[FakeJob] = JobTable()
    job = make_job()
    table.start(job, job.serve(), job.release)
    await asyncio.sleep(0)
    if ends_by_itself:
        job.gate.set()
        await asyncio.sleep(0)
    for _ in range(4):
        table.cancel(job.key)
        await asyncio.sleep(0)
    await table.wait_empty()
    assert job.released == ["released"]


async def test_a_broken_link_drops_its_own_jobs_only() -> None:
    table: JobTable[FakeJob] = JobTable()
    mine, other = RouterLink("mine"), RouterLink("other")
    jobs = [make_job("a", mine), make_job("b", mine), make_job("c", other)]
    for job in jobs:
        table.start(job, job.serve(), job.release)
    table.drop(mine)
    for _ in range(9):  # steps of the loop that cancelling and clean-up take
        await asyncio.sleep(0)
    assert [bool(job.released) for job in jobs] == [True, True, False]
    table.cancel(jobs[2].key)
    await table.wait_empty()


async def test_a_key_that_is_taken_fails_the_newcomer() -> None:
    table: JobTable[FakeJob] = JobTable()
    first, second = make_job(), make_job()
    assert table.start(first, first.serve(), first.release)
    assert not table.start(second, second.serve(), second.release)
    message = await second.link.next_message()
    assert message.failed.code == "internal"
    assert table.get(first.key) is first
    first.gate.set()
    await table.wait_empty()


async def test_a_defect_becomes_an_error_at_the_router() -> None:
    async def explode() -> None:
        raise ValueError("boom")

    table: JobTable[FakeJob] = JobTable()
    job = make_job()
    table.start(job, explode(), job.release)
    await table.wait_empty()
    message = await job.link.next_message()
    assert (message.failed.code, message.failed.message) == ("internal", "ValueError: boom")


async def test_lines_of_a_job_tell_whose_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.setFormatter(JsonFormatter({}))
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    table, job = JobTable[FakeJob](), make_job("req_7-p0-1")
    job.traceparent = f"00-{trace_id}-00f067aa0ba902b7-01"

    async def serve() -> None:
        logging.getLogger("deep.inside").warning("slow")
        raise LookupError("a defect")

    table.start(job, serve(), job.release)
    await table.wait_empty()
    lines = [json.loads(line) for line in caplog.text.splitlines() if line.startswith("{")]
    assert [line["logger"] for line in lines] == ["deep.inside", "segue.jobs"]
    whose = {(line["request_id"], line["sequence_id"], line["trace_id"]) for line in lines}
    assert whose == {("req_7", "req_7-p0-1", trace_id)}
