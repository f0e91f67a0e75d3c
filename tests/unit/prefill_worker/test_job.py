from __future__ import annotations

import asyncio

import pytest

from engine.sequence import Sequence
from prefill_worker.job import PrefillJob
from prefill_worker.outgoing import OutgoingKV
from segue.errors import TransferError
from segue.sampling import SamplingParams
from segue.v1 import worker_pb2 as pb
from segue.worker_link import RouterLink


def job() -> PrefillJob:
    return PrefillJob(
        key=pb.SequenceKey(sequence_id="1"),
        link=RouterLink("router-0"),
        sequence=Sequence("1", [1, 2], SamplingParams(max_tokens=1)),
        hands_over=True,
        block_hashes=[],
        outgoing=OutgoingKV(1, 2),
        num_decode_ranks=1,
    )


async def test_a_job_that_waits_is_told_how_it_failed(unheard_errors):
    failed = job()
    failed.fail(TransferError("the receiver is gone"))
    with pytest.raises(TransferError, match="gone"):
        await failed.first_token
    assert not failed.hand_over.done()
    assert not unheard_errors()


async def test_a_job_that_was_cancelled_need_not_hear_of_a_failure(unheard_errors):
    cancelled = job()
    waiting = asyncio.ensure_future(cancelled.first_token)
    waiting.cancel()
    cancelled.fail(TransferError("opening it failed"))
    del cancelled, waiting
    assert not unheard_errors()
