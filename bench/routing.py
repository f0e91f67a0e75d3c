"""`python -m bench.routing --trace conversation_trace.jsonl`: real placement over simulated workers, on a real workload.

    a request arrives → the router's placement chooses → its prompt waits and is computed → it is decoded

Placement, the index of prefix caches and the workers' block pools are those of a real cluster; time is virtual, and steps take
as long as a few constants say. The trace is Mooncake's (FAST'25): a JSON object a line, with `timestamp` in milliseconds,
`input_length` and `output_length` in tokens, and `hash_ids`, one for each 512 tokens, equal where prompts begin alike.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from bench.machine import commit, machine_facts
from bench.report import Report, Row, percentile, print_report, write_json
from engine.block_pool import BlockPool, Lease
from router.placement import Placed, Placement, Wanted
from router.policies import POLICIES
from router.workers import WorkerLink, Workers
from segue.cache_feed import CacheFeed
from segue.membership import Membership
from segue.prefix import block_hashes
from segue.v1 import worker_pb2
from segue.v1.inference_pb2 import WorkerLoad

BLOCK_SIZE = 512
# Of a hand-over, besides what is hidden behind computing, and of what prefill fetches from decode.
HAND_OVER_MS = 2.0
FETCH_MS_PER_TOKEN = 0.01
# Of a worker: with these, four prefill workers are busy about two thirds of the time, were nothing cached.
PREFILL_MS_PER_TOKEN = 0.065
DECODE_MS_PER_STEP = 20.0
DECODE_MS_PER_SEQUENCE = 0.2


@dataclass(frozen=True, slots=True)
class Request:
    arrival_ms: float
    token_ids: list[int]
    num_output_tokens: int


@dataclass(eq=False, slots=True)
class Running:
    """A request on its way."""

    request: Request
    placed: Placed
    hashes: list[bytes]
    lease: Lease | None = None
    # From placement to the answer's end; None where there was no memory left for it.
    decode_lease: Lease | None = None

    @property
    def reusable(self) -> list[bytes]:
        """At least the last token is computed."""
        return self.hashes[: (len(self.request.token_ids) - 1) // BLOCK_SIZE]

    @property
    def num_on_decode(self) -> int:
        """Leading tokens that decode has already."""
        return self.decode_lease.num_cached * BLOCK_SIZE if self.decode_lease is not None else 0


@dataclass(eq=False)
class SimulatedWorker:
    link: WorkerLink
    pool: BlockPool
    feed: CacheFeed = field(init=False)
    waiting: deque[Running] = field(default_factory=deque)
    computing: Running | None = None
    num_decoding: int = 0
    busy_ms: float = 0.0

    def __post_init__(self) -> None:
        self.feed = self.pool.listener = CacheFeed(lambda: self.pool.published)
        self.link._deliver(worker_pb2.LinkResponse(cache_events=self.feed.snapshot()))  # noqa: SLF001
        self.tell()

    def tell(self) -> None:
        """What a worker tells its router, at once."""
        load = WorkerLoad(
            free_blocks=self.pool.num_free,
            cached_blocks=self.pool.num_cached,
            queued_tokens=sum(
                len(running.request.token_ids) - self.pool.num_leading(running.reusable) * BLOCK_SIZE
                for running in self.waiting
            ),
            decode_sequences=self.num_decoding,
            prefill_ms_per_token=PREFILL_MS_PER_TOKEN,
            decode_ms_per_step=DECODE_MS_PER_STEP,
            decode_ms_per_sequence=DECODE_MS_PER_SEQUENCE,
        )
        self.link._deliver(worker_pb2.LinkResponse(load=load))  # noqa: SLF001
        if (events := self.feed.take()) is not None:
            self.link._deliver(worker_pb2.LinkResponse(cache_events=events))  # noqa: SLF001


@dataclass
class Outcome:
    hit_share: float
    ttft_ms: list[float]
    # Busy time of the busiest prefill worker over the mean.
    imbalance: float


def read_trace(path: Path, limit: int) -> list[Request]:
    requests = []
    with path.open() as lines:
        for line in itertools.islice(lines, limit or None):
            entry = json.loads(line)
            tokens = [block for block in entry["hash_ids"] for _ in range(BLOCK_SIZE)]
            requests.append(Request(entry["timestamp"], tokens[: entry["input_length"]], entry["output_length"]))
    return requests


def ideal_hit_share(requests: Sequence[Request]) -> float:
    """Of prompt tokens, with one cache that never forgets."""
    seen, num_hit, num_all = set[bytes](), 0, 0
    for request in requests:
        hashes = block_hashes(request.token_ids, BLOCK_SIZE)
        num_known = sum(1 for _ in itertools.takewhile(seen.__contains__, hashes))
        num_hit += min(BLOCK_SIZE * num_known, len(request.token_ids) - 1)
        num_all += len(request.token_ids)
        seen.update(hashes)
    return num_hit / num_all


class Simulation:
    def __init__(self, policy: str, num_pairs: int, num_blocks: int, *, pulls_kv: bool = True) -> None:
        self._workers = Workers(Membership("redis://127.0.0.1:1", "bench"), "router", "m")
        self._simulated: dict[WorkerLink, SimulatedWorker] = {}
        for number in range(num_pairs):
            for role in ("prefill", "decode"):
                self._join(f"{role}-{number}", role, num_blocks, pulls_kv)
        self._placement = Placement(self._workers, policy, may_join=False)
        self._events: list[tuple[float, int, Running]] = []
        self._order = itertools.count()
        self._now_ms = 0.0
        self._num_hit = 0
        self._ttft_ms: list[float] = []

    def _join(self, worker_id: str, role: str, num_blocks: int, pulls_kv: bool) -> None:
        record = worker_pb2.WorkerRecord(
            worker_id=worker_id,
            roles=[role],
            layout_fingerprint="f",
            total_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            pulls_kv=pulls_kv,
        )
        link = WorkerLink(record, "router", self._workers.fleet)
        self._workers._links[worker_id] = link  # noqa: SLF001
        link._deliver(worker_pb2.LinkResponse(opened=worker_pb2.LinkOpened(worker=record)))  # noqa: SLF001
        self._simulated[link] = SimulatedWorker(link, BlockPool(num_blocks))

    def run(self, requests: Sequence[Request], label: str) -> Outcome:
        for request in track(requests, label, transient=True):
            self._run_until(request.arrival_ms)
            placed = self._placement.place(Wanted(request.token_ids, request.num_output_tokens))
            placed.__enter__()
            running = Running(request, placed, block_hashes(request.token_ids, BLOCK_SIZE))
            num_tokens = len(request.token_ids) + request.num_output_tokens
            running.decode_lease = self._simulated[placed.decode].pool.lease(-(-num_tokens // BLOCK_SIZE), running.hashes)
            worker = self._simulated[placed.prefill]
            worker.waiting.append(running)
            self._compute_next(worker)
        self._run_until(float("inf"))
        busy_ms = [worker.busy_ms for worker in self._simulated.values() if worker.busy_ms]
        num_tokens = sum(len(request.token_ids) for request in requests)
        return Outcome(self._num_hit / num_tokens, self._ttft_ms, max(busy_ms) * len(busy_ms) / sum(busy_ms))

    def _run_until(self, time_ms: float) -> None:
        while self._events and self._events[0][0] <= time_ms:
            self._now_ms, _, running = heapq.heappop(self._events)
            if running.lease is not None:
                self._prefilled(running)
            else:
                self._decoded(running)
        self._now_ms = max(self._now_ms, time_ms) if time_ms < float("inf") else self._now_ms

    def _after(self, duration_ms: float, running: Running) -> None:
        heapq.heappush(self._events, (self._now_ms + duration_ms, next(self._order), running))

    def _compute_next(self, worker: SimulatedWorker) -> None:
        if worker.computing is None and worker.waiting:
            running = worker.computing = worker.waiting.popleft()
            num_tokens = len(running.request.token_ids)
            lease = worker.pool.lease(-(-num_tokens // BLOCK_SIZE), running.reusable)
            assert lease is not None, "a prompt is larger than a worker's memory"
            running.lease = lease
            num_cached = lease.num_cached * BLOCK_SIZE
            num_fetched = 0
            if worker.link.record.pulls_kv:
                num_fetched = max(min(running.num_on_decode, len(running.reusable) * BLOCK_SIZE) - num_cached, 0)
            self._num_hit += num_cached + num_fetched
            duration_ms = num_fetched * FETCH_MS_PER_TOKEN + (num_tokens - num_cached - num_fetched) * PREFILL_MS_PER_TOKEN
            worker.busy_ms += duration_ms
            self._after(duration_ms, running)
        worker.tell()

    def _prefilled(self, running: Running) -> None:
        worker, decode = self._simulated[running.placed.prefill], self._simulated[running.placed.decode]
        assert running.lease is not None
        for index, block_hash in enumerate(running.hashes):
            worker.pool.publish(running.lease, index, block_hash)
            if running.decode_lease is not None:
                decode.pool.publish(running.decode_lease, index, block_hash)
        worker.pool.release(running.lease)
        running.lease = worker.computing = None
        running.placed.end_prefill()
        running.placed.handed_over(len(running.request.token_ids) - running.num_on_decode, 0, HAND_OVER_MS / 1000)
        self._ttft_ms.append(self._now_ms - running.request.arrival_ms)
        self._compute_next(worker)
        decode.num_decoding += 1
        decode.tell()
        step_ms = DECODE_MS_PER_STEP + DECODE_MS_PER_SEQUENCE * decode.num_decoding
        self._after(HAND_OVER_MS + step_ms * running.request.num_output_tokens, running)

    def _decoded(self, running: Running) -> None:
        decode = self._simulated[running.placed.decode]
        decode.num_decoding -= 1
        if running.decode_lease is not None:
            decode.pool.release(running.decode_lease)
        decode.tell()
        running.placed.__exit__(None, None, None)
        self._placement.learn_length(running.request.num_output_tokens)


def main(
    trace: Annotated[Path, typer.Option(help="The workload, in Mooncake's format.", exists=True, dir_okay=False)],
    pairs: Annotated[int, typer.Option(min=1, help="Prefill workers, and as many decode workers.")] = 4,
    memory_tokens: Annotated[int, typer.Option(min=150_000, help="KV memory of each worker.")] = 4_000_000,
    requests: Annotated[int, typer.Option(min=0, help="The first so many requests; 0 is all.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there as well.")] = None,
) -> None:
    """Replay a trace under each policy: what is found in caches, how long first tokens take, how even the load is."""
    console = Console(highlight=False, soft_wrap=True)
    asked = read_trace(trace, requests)
    ideal = ideal_hit_share(asked)
    outcomes = {name: Simulation(name, pairs, memory_tokens // BLOCK_SIZE).run(asked, name) for name in POLICIES}
    outcomes["cost_without_fetching"] = Simulation("cost", pairs, memory_tokens // BLOCK_SIZE, pulls_kv=False).run(
        asked, "cost, nothing fetched from decode"
    )
    outcomes["cost_infinite_cache"] = Simulation("cost", pairs, 400_000).run(asked, "cost, infinite caches")
    rows = [Row("hit_share_ideal", ideal, "share")]
    base = outcomes["round_robin"]
    for name, outcome in outcomes.items():
        against = {"ideal": outcome.hit_share / ideal, "round_robin": outcome.hit_share / base.hit_share}
        rows.append(Row(f"hit_share_{name}", outcome.hit_share, "share", against))
    for name, outcome in outcomes.items():
        for percent in (50, 99):
            value = percentile(outcome.ttft_ms, percent)
            rows.append(
                Row(f"ttft_ms_p{percent}_{name}", value, "ms", {"round_robin": value / percentile(base.ttft_ms, percent)})
            )
        rows.append(Row(f"imbalance_{name}", outcome.imbalance, "max/mean"))
    facts = {**machine_facts(), "trace": trace.name, "requests": len(asked), "pairs": pairs, "memory_tokens": memory_tokens}
    report = Report(facts, commit(), rows)
    print_report(report, console)
    if json_file is not None:
        write_json(report, json_file)


if __name__ == "__main__":
    typer.run(main)
