"""Metrics follow Prometheus' conventions (as promtool checks them, and more), and are exported as they are described."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.fake import FakeSequenceServer
from router.metric_families import FAMILIES, LABELS, OF_WORKERS, Family
from router.metrics import Metrics
from router.worker_metrics import read_worker
from segue.histogram import Histogram
from segue.v1 import inference_pb2 as pb

# What promtool knows of units that are no base units, and how they are shortened.
NOT_BASE_UNITS = re.compile(
    r"_(ms|us|ns|s|secs?|millis|milliseconds?|microseconds?|nanoseconds?|minutes?|hours?|days?|kb|mb|gb|kib|mib|gib|"
    r"kilobytes?|megabytes?|gigabytes?|kibibytes?|mebibytes?|bits?|percent|pct)(_|$)"
)
BASE_UNITS = {"seconds", "bytes", "ratio"}
PER_REQUEST = re.compile(r"(^|_)(id|key|user|tenant|prompt|trace|sequence|request|epoch|pid|address)($|_)")


def problems(family: Family) -> list[str]:
    name, words = family.name, family.name.split("_")
    base = words[:-1] if words[-1] == "total" else words
    found = {
        "prefix": not name.startswith("segue_"),
        "snake case": not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name),
        "_total": name.endswith("_total") != (family.kind == "counter"),
        "base unit": bool(NOT_BASE_UNITS.search(name)),
        "unit last": any(word in BASE_UNITS for word in base[:-1]),
        "type in name": bool({"counter", "gauge", "histogram", "summary"} & set(words)),
        "reserved suffix": words[-1] in {"count", "sum", "bucket", "info", "created"},
        "help": not re.match("[A-Z0-9]", family.help) or family.help[-1:] in {".", " ", ":", ""},
        "labels unknown": not set(family.labels) <= LABELS.keys() or len(set(family.labels)) != len(family.labels),
        "cardinality": any(PER_REQUEST.search(label) for label in family.labels) or "le" in family.labels,
        "buckets": bool(family.buckets) and (family.kind != "histogram" or not are_sensible(family.buckets)),
        "no buckets": family.kind == "histogram" and not family.buckets and family not in OF_WORKERS,
    }
    return [problem for problem, is_there in found.items() if is_there]


def are_sensible(buckets: tuple[float, ...]) -> bool:
    """From fine to coarse, few enough to store, without a gap that would hide where a quantile is."""
    steps = [after / before for before, after in pairwise(buckets)]
    return buckets[0] > 0 and 8 <= len(buckets) <= 16 and all(1 < step <= 3 for step in steps)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_metric_follows_the_conventions(family: Family) -> None:
    assert problems(family) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": "requests_total"}, "prefix"),
        ({"name": "segue_Requests_total"}, "snake case"),
        ({"name": "segue__requests_total"}, "snake case"),
        ({"name": "segue_requests"}, "_total"),
        ({"kind": "gauge"}, "_total"),
        ({"name": "segue_wait_ms_total"}, "base unit"),
        ({"name": "segue_sent_megabytes_total"}, "base unit"),
        ({"name": "segue_bytes_sent_total"}, "unit last"),
        ({"name": "segue_requests_counter_total"}, "type in name"),
        ({"name": "segue_requests_count", "kind": "gauge"}, "reserved suffix"),
        ({"help": ""}, "help"),
        ({"help": "Requests that ended."}, "help"),
        ({"help": "requests that ended"}, "help"),
        ({"labels": ("api", "colour")}, "labels unknown"),
        ({"labels": ("api", "api")}, "labels unknown"),
        ({"labels": ("request_id",)}, "cardinality"),
        ({"labels": ("tenant",)}, "cardinality"),
        ({"buckets": (1.0, 2.0)}, "buckets"),
        ({"name": "segue_x_seconds", "kind": "histogram", "buckets": (1.0, 0.5) * 5}, "buckets"),
        ({"name": "segue_x_seconds", "kind": "histogram", "buckets": tuple(10.0**i for i in range(10))}, "buckets"),
        ({"name": "segue_x_seconds", "kind": "histogram"}, "no buckets"),
    ],
)
def test_a_metric_that_does_not_would_be_seen(change: dict[str, object], problem: str) -> None:
    sound = Family("segue_requests_total", "counter", "Requests that ended", ("api",))
    assert problems(sound) == []
    assert problem in problems(replace(sound, **change))


def busy_worker() -> pb.WorkerStatus:
    """With every number of its own, so that none can be taken for another."""
    steps, sizes, seconds = Histogram((1.0, 2.0)), Histogram((4.0,)), Histogram((0.5,))
    for value in (1.0, 2.0, 9.0):
        steps.observe(value)
    sizes.observe(3.0)
    seconds.observe(0.75)
    load = pb.WorkerLoad(
        waiting_requests=101,
        running_requests=102,
        queued_tokens=103,
        free_blocks=104,
        leased_blocks=105,
        cached_blocks=106,
        total_blocks=107,
        prefilled_tokens=201,
        decoded_tokens=202,
        transferred_bytes=203,
        preemptions=204,
        open_tickets=205,
        step_age_ms=1500,
        prefill_step_tokens=steps.to_pb(),
        decode_step_sequences=sizes.to_pb(),
        transfer_seconds=seconds.to_pb(),
        transfer_failures={"lease_expired": 7},
        prefix_hits={"prefill": 8, "decode": 9},
    )
    return pb.WorkerStatus(worker_id="w", roles=["decode"], state="ready", load=load, started_unix_s=1e9)


def test_what_is_exported_is_what_is_described() -> None:
    server = FakeSequenceServer(lambda _: [])
    server.workers = [busy_worker()]
    exported = list(text_string_to_metric_families(Metrics(server).exposition().decode()))
    described = {family.name.removesuffix("_total"): (family.kind, family.help) for family in FAMILIES}
    # prometheus_client tells beside each counter and histogram when it was created.
    named = [family for family in exported if not family.name.endswith("_created")]
    assert {family.name: (family.type, family.documentation) for family in named} == described
    assert max(Counter(family.name for family in named).values()) == 1


def test_a_worker_is_read_field_by_field() -> None:
    server = FakeSequenceServer(lambda _: [])
    server.workers = [busy_worker()]
    text = Metrics(server).exposition().decode()
    values = {
        (sample.name, *(value for label, value in sorted(sample.labels.items()) if label != "worker")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("worker") == "w"
    }
    expected = {
        ("segue_worker_state", "decode", "ready"): 1,
        ("segue_worker_start_time_seconds",): 1e9,
        ("segue_worker_requests", "waiting"): 101,
        ("segue_worker_requests", "running"): 102,
        ("segue_worker_queued_tokens",): 103,
        ("segue_worker_kv_blocks", "free"): 104,
        ("segue_worker_kv_blocks", "leased"): 105,
        ("segue_worker_kv_blocks", "cached"): 106,
        ("segue_worker_kv_blocks_capacity",): 107,
        ("segue_worker_prefilled_tokens_total",): 201,
        ("segue_worker_decoded_tokens_total",): 202,
        ("segue_worker_transferred_bytes_total",): 203,
        ("segue_worker_preemptions_total",): 204,
        ("segue_worker_open_tickets",): 205,
        ("segue_worker_step_age_seconds",): 1.5,
        ("segue_worker_prefill_step_tokens_bucket", "1.0"): 1,
        ("segue_worker_prefill_step_tokens_bucket", "2.0"): 2,
        ("segue_worker_prefill_step_tokens_bucket", "+Inf"): 3,
        ("segue_worker_prefill_step_tokens_count",): 3,
        ("segue_worker_prefill_step_tokens_sum",): 12,
        ("segue_worker_decode_step_sequences_bucket", "4.0"): 1,
        ("segue_worker_decode_step_sequences_bucket", "+Inf"): 1,
        ("segue_worker_decode_step_sequences_count",): 1,
        ("segue_worker_decode_step_sequences_sum",): 3,
        ("segue_worker_transfer_seconds_bucket", "0.5"): 0,
        ("segue_worker_transfer_seconds_bucket", "+Inf"): 1,
        ("segue_worker_transfer_seconds_count",): 1,
        ("segue_worker_transfer_seconds_sum",): 0.75,
        ("segue_worker_failed_transfers_total", "lease_expired"): 7,
        ("segue_worker_prefix_hit_tokens_total", "prefill"): 8,
        ("segue_worker_prefix_hit_tokens_total", "decode"): 9,
    }
    assert values == expected


def test_every_metric_of_workers_is_read() -> None:
    assert read_worker(pb.WorkerStatus()).keys() == set(OF_WORKERS)


def test_a_worker_that_told_nothing_yet_is_exported() -> None:
    server = FakeSequenceServer(lambda _: [])
    server.workers = [pb.WorkerStatus(worker_id="w", roles=["prefill"], state="lost")]
    assert b'segue_worker_state{role="prefill",state="lost",worker="w"} 1.0' in Metrics(server).exposition()
