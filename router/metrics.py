"""Counts what a router does (metric_families.py says what there is); each Metrics has its own registry."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, generate_latest

from router import metric_families as families
from router.generation import ChoiceOutput, GenerationDone, GenerationEvent
from router.recent import RecentLatency
from router.sequence import SequenceServer
from router.worker_metrics import WorkerCollector
from segue.errors import RequestCancelled, SegueError
from segue.lifecycle import Phase


class Metrics:
    """`last_decoded_s` is when, on `clock`, a token that a decode worker made was last seen; None for never."""

    def __init__(self, server: SequenceServer, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.last_decoded_s: float | None = None
        self.registry = registry = CollectorRegistry()
        self.requests = families.REQUESTS.counter(registry)
        self.active = families.ACTIVE_REQUESTS.gauge(registry)
        self.ttft = families.TTFT.histogram(registry)
        self.inter_token = families.INTER_TOKEN.histogram(registry)
        self.duration = families.REQUEST.histogram(registry)
        self.handover = families.HANDOVER.histogram(registry)
        self.prompt_tokens = families.PROMPT_TOKENS.counter(registry)
        self.output_tokens = families.OUTPUT_TOKENS.counter(registry)
        self.prefix_hits = families.PREFIX_HIT_TOKENS.counter(registry)
        self.placements = families.PLACEMENTS.counter(registry)
        self.failed_attempts = families.FAILED_ATTEMPTS.counter(registry)
        self.transferred = families.TRANSFERRED_BYTES.counter(registry)
        registry.register(WorkerCollector(server))
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
