"""The workers' own numbers, read at the moment of a scrape from what they told last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from router import metric_families as families
from router.metric_families import Family
from router.sequence import SequenceServer
from segue.v1 import inference_pb2 as pb

# By label values besides the worker's name.
Values = Mapping[tuple[str, ...], float | pb.Histogram]


class WorkerCollector(Collector):
    def __init__(self, server: SequenceServer) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        status = self._server.status()
        yield _metric(families.MEMBERSHIP_FRESH, [((), status.membership_fresh)])
        yield _metric(families.WAITING_REQUESTS, [((), status.waiting_requests)])
        read = {worker.worker_id: read_worker(worker) for worker in status.workers}
        for family in families.OF_WORKERS:
            yield _metric(
                family,
                [((name, *labels), value) for name, values in read.items() for labels, value in values[family].items()],
            )


def read_worker(worker: pb.WorkerStatus) -> dict[Family, Values]:
    """One entry for each of `families.OF_WORKERS`."""
    load = worker.load
    return {
        families.WORKER_STATE: {(role, worker.state): 1 for role in worker.roles},
        families.WORKER_START_TIME: {(): worker.started_unix_s},
        families.WORKER_KV_BLOCKS: {
            ("free",): load.free_blocks,
            ("leased",): load.leased_blocks,
            ("cached",): load.cached_blocks,
        },
        families.WORKER_KV_BLOCKS_CAPACITY: {(): load.total_blocks},
        families.WORKER_REQUESTS: {("waiting",): load.waiting_requests, ("running",): load.running_requests},
        families.WORKER_QUEUED_TOKENS: {(): load.queued_tokens},
        families.WORKER_OPEN_TICKETS: {(): load.open_tickets},
        families.WORKER_STEP_AGE: {(): load.step_age_ms / 1000},
        families.WORKER_PREFILLED_TOKENS: {(): load.prefilled_tokens},
        families.WORKER_DECODED_TOKENS: {(): load.decoded_tokens},
        families.WORKER_PREFILL_STEP_TOKENS: {(): load.prefill_step_tokens},
        families.WORKER_DECODE_STEP_SEQUENCES: {(): load.decode_step_sequences},
        families.WORKER_PREFIX_HIT_TOKENS: {(place,): number for place, number in load.prefix_hits.items()},
        families.WORKER_PREEMPTIONS: {(): load.preemptions},
        families.WORKER_TRANSFERRED_BYTES: {(): load.transferred_bytes},
        families.WORKER_TRANSFER: {(): load.transfer_seconds},
        families.WORKER_FAILED_TRANSFERS: {(reason,): number for reason, number in load.transfer_failures.items()},
    }


def _metric(family: Family, values: Iterable[tuple[tuple[str, ...], float | pb.Histogram]]) -> Metric:
    if family.kind == "histogram":
        histograms = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        for labels, value in values:
            assert isinstance(value, pb.Histogram)
            if value.counts:  # none before a worker told its load
                histograms.add_metric(labels, _buckets(value), value.sum)
        return histograms
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(family.name, family.help, labels=family.labels)
    for labels, value in values:
        assert not isinstance(value, pb.Histogram)
        metric.add_metric(labels, value)
    return metric


def _buckets(histogram: pb.Histogram) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus has them."""
    bounds = [*map(str, histogram.bounds), "+Inf"]
    return list(zip(bounds, accumulate(histogram.counts), strict=True))
