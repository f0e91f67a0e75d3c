"""Prometheus metrics of a router. Names start with segue_, units are base units; each Metrics has its own registry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from router.generation import ChoiceOutput, GenerationDone, GenerationEvent
from router.recent import RecentLatency
from router.sequence import SequenceServer
from segue.errors import RequestCancelled, SegueError
from segue.lifecycle import Phase
from segue.v1 import inference_pb2 as pb

# From a GPU's single milliseconds to a laptop CPU with long prompts.
_TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
_REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_HANDOVER_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """`last_decoded_s` is when, on `clock`, a token that a decode worker made was last seen; None for never."""

    def __init__(self, server: SequenceServer, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.last_decoded_s: float | None = None
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("segue_requests", "Requests that ended", ["api", "outcome"], registry=registry)
        self.active = Gauge("segue_active_requests", "Requests under way", ["api"], registry=registry)
        self.ttft = _histogram(registry, "segue_time_to_first_token_seconds", "Arrival to first token", _TTFT_BUCKETS_S)
        self.inter_token = _histogram(registry, "segue_inter_token_seconds", "Between tokens", _INTER_TOKEN_BUCKETS_S)
        self.duration = _histogram(registry, "segue_request_seconds", "Arrival to the end", _REQUEST_BUCKETS_S)
        self.handover = Histogram(
            "segue_handover_seconds", "First token to KV held by decode", buckets=_HANDOVER_BUCKETS_S, registry=registry
        )
        self.prompt_tokens = Counter("segue_prompt_tokens", "Prompt tokens of finished requests", registry=registry)
        self.output_tokens = Counter("segue_output_tokens", "Tokens given to clients", registry=registry)
        self.prefix_hits = Counter(
            "segue_prefix_hit_tokens", "Prompt tokens found in a prefix cache", ["place"], registry=registry
        )
        self.placements = Counter(
            "segue_placements", "Sequences by why their workers were chosen", ["reason"], registry=registry
        )
        self.failed_attempts = Counter(
            "segue_failed_attempts", "Attempts that were continued on other workers, by cause", ["cause"], registry=registry
        )
        self.transferred = Counter("segue_transferred_bytes", "KV bytes handed over", registry=registry)
        registry.register(_WorkerCollector(server))
        self.recent_ttft, self.recent_inter_token = RecentLatency(clock), RecentLatency(clock)

    @contextmanager
    def track(self, api: str) -> Iterator[RequestMeter]:
        """Counts one request, however the block ends."""
        meter = RequestMeter(self, api)
        self.active.labels(api).inc()
        try:
            yield meter
        except SegueError as error:
            meter.outcome = error.code
            raise
        except (asyncio.CancelledError, GeneratorExit):
            meter.outcome = RequestCancelled.code
            raise
        except BaseException:
            meter.outcome = "internal"
            raise
        finally:
            self.active.labels(api).dec()
            self.requests.labels(api, meter.outcome).inc()
            self.duration.labels(api).observe(self.clock() - meter.started_s)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class RequestMeter:
    """Watches one request's events. `outcome` is `ok` or the code of the error that ended it."""

    def __init__(self, metrics: Metrics, api: str) -> None:
        self._metrics = metrics
        self._ttft = metrics.ttft.labels(api)
        self._inter_token = metrics.inter_token.labels(api)
        self.started_s = metrics.clock()
        self.outcome = "ok"
        # (prompt, choice) → when its last tokens came.
        self._last_s: dict[tuple[int, int], float] = {}

    def see(self, event: GenerationEvent, prompt: int = 0) -> None:
        """`prompt` tells the prompts of a request with several apart."""
        if isinstance(event, GenerationDone):
            self._see_done(event)
        elif event.tokens:
            self._see_tokens(event, prompt)

    def _see_tokens(self, output: ChoiceOutput, prompt: int) -> None:
        metrics, now_s = self._metrics, self._metrics.clock()
        metrics.output_tokens.inc(len(output.tokens))
        key = (prompt, output.choice)
        if not self._last_s:
            self._ttft.observe(now_s - self.started_s)
            metrics.recent_ttft.add(now_s - self.started_s)
        if (last_s := self._last_s.get(key)) is not None:
            # The first token comes from prefill: only those after it show that decode works.
            metrics.last_decoded_s = now_s
            each_s = (now_s - last_s) / len(output.tokens)
            metrics.recent_inter_token.add(each_s, len(output.tokens))
            for _ in output.tokens:
                self._inter_token.observe(each_s)
        self._last_s[key] = now_s

    def _see_done(self, done: GenerationDone) -> None:
        metrics = self._metrics
        metrics.prompt_tokens.inc(done.num_prompt_tokens)
        for path in done.paths:
            metrics.prefix_hits.labels("prefill").inc(path.prefill_cached_tokens)
            metrics.prefix_hits.labels("prefill_from_decode").inc(path.prefill_pulled_tokens)
            metrics.prefix_hits.labels("decode").inc(path.decode_cached_tokens)
            metrics.transferred.inc(path.transferred_bytes)
            if path.placement:
                metrics.placements.labels(path.placement).inc()
            for failed in path.failed_attempts:
                metrics.failed_attempts.labels(failed.error.code).inc()
            handover_s = path.lifecycle.seconds(Phase.TRANSFERRING, Phase.DECODING)
            if handover_s is not None:
                metrics.handover.observe(handover_s)


def _histogram(registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, text, ["api"], buckets=buckets, registry=registry)


class _WorkerCollector(Collector):
    """Reads the workers' own numbers at the moment of a scrape."""

    def __init__(self, server: SequenceServer) -> None:
        self._server = server

    def collect(self) -> Iterable[GaugeMetricFamily]:
        state = GaugeMetricFamily(
            "segue_worker_state", "1 for the state that a worker is in", labels=["worker", "role", "state"]
        )
        blocks = GaugeMetricFamily("segue_worker_kv_blocks", "KV blocks by what holds them", labels=["worker", "held"])
        capacity = GaugeMetricFamily("segue_worker_kv_blocks_capacity", "All KV blocks", labels=["worker"])
        requests = GaugeMetricFamily("segue_worker_requests", "Requests on a worker", labels=["worker", "state"])
        queued = GaugeMetricFamily("segue_worker_queued_tokens", "Prompt tokens not yet computed", labels=["worker"])
        status = self._server.status()
        fresh = GaugeMetricFamily(
            "segue_membership_fresh",
            "1 while the store answers; 0: the workers are those known so far",
            int(status.membership_fresh),
        )
        for worker in status.workers:
            name, load = worker.worker_id, worker.load
            for role in worker.roles:
                state.add_metric([name, role, worker.state], 1)
            for held, number in _blocks(load):
                blocks.add_metric([name, held], number)
            capacity.add_metric([name], load.total_blocks)
            requests.add_metric([name, "waiting"], load.waiting_requests)
            requests.add_metric([name, "running"], load.running_requests)
            queued.add_metric([name], load.queued_tokens)
        return [state, blocks, capacity, requests, queued, fresh]


def _blocks(load: pb.WorkerLoad) -> list[tuple[str, int]]:
    return [("free", load.free_blocks), ("leased", load.leased_blocks), ("cached", load.cached_blocks)]
