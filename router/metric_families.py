"""Every metric that a router exports: names, types, labels, help. docs/metrics.md is written from it.

By Prometheus' conventions: base units, the unit last, `_total` for counters; no label whose values grow with the number of
requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


@dataclass(frozen=True, slots=True)
class Family:
    """`name` as Prometheus stores it. `buckets`, upper bounds, are a histogram's; those of workers come from them."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def counter(self, registry: CollectorRegistry) -> Counter:
        return Counter(self.name, self.help, self.labels, registry=registry)

    def gauge(self, registry: CollectorRegistry) -> Gauge:
        return Gauge(self.name, self.help, self.labels, registry=registry)

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        return Histogram(self.name, self.help, self.labels, registry=registry, buckets=self.buckets)


# All labels there are, and their values.
LABELS = {
    "api": "`chat`, `completions` or `grpc`",
    "outcome": "`ok`, or the code of the error that ended the request",
    "worker": "a worker's name",
    "role": "`prefill` or `decode`",
    "state": "of workers `ready`, `draining`, `drained` or `lost`; of requests `waiting` or `running`",
    "held": "`free`, `leased` or `cached`",
    "place": "whose cache it was: `prefill`, `decode`, or `prefill_from_decode` for what prefill fetched from decode",
    "reason": "of placements the policy's word for its choice; of failed transfers the code of the error",
    "cause": "the code of the error",
}

REQUESTS = Family("segue_requests_total", "counter", "Requests that ended", ("api", "outcome"))
ACTIVE_REQUESTS = Family("segue_active_requests", "gauge", "Requests under way", ("api",))
WAITING_REQUESTS = Family("segue_waiting_requests", "gauge", "Requests that wait for their turn to be sent to workers")
# From a GPU's single milliseconds to a laptop CPU with long prompts.
TTFT = Family(
    "segue_time_to_first_token_seconds",
    "histogram",
    "Arrival to first token",
    ("api",),
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
INTER_TOKEN = Family(
    "segue_inter_token_seconds",
    "histogram",
    "Between tokens of one sequence",
    ("api",),
    (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56),
)
REQUEST = Family(
    "segue_request_seconds",
    "histogram",
    "Arrival to the end, however that came",
    ("api",),
    (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
)
HANDOVER = Family(
    "segue_handover_seconds",
    "histogram",
    "First token to KV held by decode",
    (),
    (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
PROMPT_TOKENS = Family("segue_prompt_tokens_total", "counter", "Prompt tokens of finished requests")
OUTPUT_TOKENS = Family("segue_output_tokens_total", "counter", "Tokens given to clients")
PREFIX_HIT_TOKENS = Family(
    "segue_prefix_hit_tokens_total", "counter", "Prompt tokens of finished requests found in a prefix cache", ("place",)
)
PLACEMENTS = Family("segue_placements_total", "counter", "Sequences by why their workers were chosen", ("reason",))
FAILED_ATTEMPTS = Family("segue_failed_attempts_total", "counter", "Attempts that were continued on other workers", ("cause",))
TRANSFERRED_BYTES = Family("segue_transferred_bytes_total", "counter", "KV bytes handed over for finished requests")
MEMBERSHIP_FRESH = Family("segue_membership_fresh", "gauge", "1 while the store answers; 0: the workers are those known so far")
OF_ROUTER = (
    REQUESTS,
    ACTIVE_REQUESTS,
    WAITING_REQUESTS,
    TTFT,
    INTER_TOKEN,
    REQUEST,
    HANDOVER,
    PROMPT_TOKENS,
    OUTPUT_TOKENS,
    PREFIX_HIT_TOKENS,
    PLACEMENTS,
    FAILED_ATTEMPTS,
    TRANSFERRED_BYTES,
    MEMBERSHIP_FRESH,
)

WORKER_STATE = Family("segue_worker_state", "gauge", "1 for the state that a worker is in", ("worker", "role", "state"))
WORKER_START_TIME = Family(
    "segue_worker_start_time_seconds", "gauge", "When the worker started, in Unix time; each change is a restart", ("worker",)
)
WORKER_KV_BLOCKS = Family("segue_worker_kv_blocks", "gauge", "KV blocks by what holds them", ("worker", "held"))
WORKER_KV_BLOCKS_CAPACITY = Family("segue_worker_kv_blocks_capacity", "gauge", "All KV blocks", ("worker",))
WORKER_REQUESTS = Family("segue_worker_requests", "gauge", "Sequences on a worker", ("worker", "state"))
WORKER_QUEUED_TOKENS = Family("segue_worker_queued_tokens", "gauge", "Prompt tokens not yet computed", ("worker",))
WORKER_OPEN_TICKETS = Family("segue_worker_open_tickets", "gauge", "Transfers under way, on either side", ("worker",))
WORKER_STEP_AGE = Family(
    "segue_worker_step_age_seconds", "gauge", "How long the step that is being computed has taken so far", ("worker",)
)
WORKER_PREFILLED_TOKENS = Family("segue_worker_prefilled_tokens_total", "counter", "Prompt tokens computed", ("worker",))
WORKER_DECODED_TOKENS = Family("segue_worker_decoded_tokens_total", "counter", "Tokens decoded", ("worker",))
WORKER_PREFILL_STEP_TOKENS = Family(
    "segue_worker_prefill_step_tokens", "histogram", "Prompt tokens in a prefill step", ("worker",)
)
WORKER_DECODE_STEP_SEQUENCES = Family(
    "segue_worker_decode_step_sequences", "histogram", "Sequences in a decode step", ("worker",)
)
WORKER_PREFIX_HIT_TOKENS = Family(
    "segue_worker_prefix_hit_tokens_total", "counter", "Prompt tokens found in a prefix cache", ("worker", "place")
)
WORKER_PREEMPTIONS = Family(
    "segue_worker_preemptions_total", "counter", "Sequences that gave their KV blocks up to older ones", ("worker",)
)
WORKER_TRANSFERRED_BYTES = Family(
    "segue_worker_transferred_bytes_total", "counter", "KV bytes sent to other workers", ("worker",)
)
WORKER_TRANSFER = Family(
    "segue_worker_transfer_seconds", "histogram", "KV sent, from the first block to the receipt", ("worker",)
)
WORKER_FAILED_TRANSFERS = Family(
    "segue_worker_failed_transfers_total", "counter", "Transfers that failed; both workers count one", ("worker", "reason")
)
OF_WORKERS = (
    WORKER_STATE,
    WORKER_START_TIME,
    WORKER_KV_BLOCKS,
    WORKER_KV_BLOCKS_CAPACITY,
    WORKER_REQUESTS,
    WORKER_QUEUED_TOKENS,
    WORKER_OPEN_TICKETS,
    WORKER_STEP_AGE,
    WORKER_PREFILLED_TOKENS,
    WORKER_DECODED_TOKENS,
    WORKER_PREFILL_STEP_TOKENS,
    WORKER_DECODE_STEP_SEQUENCES,
    WORKER_PREFIX_HIT_TOKENS,
    WORKER_PREEMPTIONS,
    WORKER_TRANSFERRED_BYTES,
    WORKER_TRANSFER,
    WORKER_FAILED_TRANSFERS,
)
FAMILIES = OF_ROUTER + OF_WORKERS
