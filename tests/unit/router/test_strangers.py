"""Workers that do not have the router's cluster secret."""

from __future__ import annotations

import logging

import pytest

from router.workers import Workers
from segue.cluster_secret import ClusterSecret
from segue.membership import Membership
from segue.v1.worker_pb2 import WorkerRecord

SECRET, OTHER = ClusterSecret("s" * 32), ClusterSecret("t" * 32)


@pytest.mark.parametrize("fingerprint", [OTHER.fingerprint, ""], ids=["another", "none"])
async def test_a_worker_without_the_secret_is_left_out_and_the_log_says_why_once(membership, caplog, fingerprint):
    workers = Workers(membership, "router-0", "m", SECRET)
    record = WorkerRecord(worker_id="decode-0", epoch=1, model="m", address="127.0.0.1:1", secret_fingerprint=fingerprint)
    await membership.announce(record, 60_000)
    with caplog.at_level(logging.ERROR):
        await workers._look()
        await workers._look()
    assert workers.all() == []
    assert caplog.text.count("SEGUE_CLUSTER_SECRET") == 1
    assert "decode-0" in caplog.text


async def test_a_member_is_taken(membership: Membership):
    async with Workers(membership, "router-0", "m", SECRET).running() as workers:
        await membership.announce(
            WorkerRecord(
                worker_id="decode-0", epoch=1, model="m", address="127.0.0.1:1", secret_fingerprint=SECRET.fingerprint
            ),
            60_000,
        )
        await workers._look()
        assert [link.record.worker_id for link in workers.all()] == ["decode-0"]
