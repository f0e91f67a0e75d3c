"""`python -m bench.placement`: how long the router takes to place a request, and what its index of prefix caches costs.

Half of the workers prefill, half decode, on hosts of eight. A prompt of 2,000 tokens is placed again and again, while workers
report load. As in a conversation, its first 256 tokens, the system prompt, are in every cache, and more of it in those of up to
ten workers. Hashing it is part of the time. The index is filled with conversations of twenty blocks, each in the cache of one
prefill and of one decode worker, any two.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from bench.machine import commit, machine_facts
from bench.report import Report, Row, median_row, print_report, write_json
from router.placement import Placement, Wanted
from router.prefix_index import PrefixIndex
from router.workers import WorkerLink, Workers
from segue.membership import Membership
from segue.prefix import HASH_BYTES, block_hashes
from segue.v1 import worker_pb2
from segue.v1.inference_pb2 import WorkerLoad

_BLOCK_SIZE = 32
_PROMPT = list(range(2000))
_SHARED_BLOCKS = 8
_WORKERS_THAT_KNOW_MORE = 10
_WORKERS_PER_HOST = 8
_ROUNDS = 5
_CONVERSATION_BLOCKS = 20


def make_workers(count: int, chance: random.Random) -> Workers:
    """Links that were never opened, and have heard what an open one hears."""
    workers = Workers(Membership("redis://127.0.0.1:1", "bench"), "router", "m")
    known = block_hashes(_PROMPT, _BLOCK_SIZE)
    for number in range(count):
        record = worker_pb2.WorkerRecord(
            worker_id=f"worker-{number}",
            roles=["prefill" if number % 2 else "decode"],
            host=f"host-{number // _WORKERS_PER_HOST}",
            layout_fingerprint="f",
            number_formats="int8",
            pulls_kv=True,
            total_blocks=10_000,
            block_size=_BLOCK_SIZE,
        )
        link = WorkerLink(record, "router", workers.fleet)
        workers._links[record.worker_id] = link  # noqa: SLF001
        depth = chance.randrange(_SHARED_BLOCKS, len(known)) if number < _WORKERS_THAT_KNOW_MORE else _SHARED_BLOCKS
        events = worker_pb2.CacheEvents(number=1, snapshot=True, stored=b"".join(known[:depth]))
        for heard in (
            worker_pb2.LinkResponse(opened=worker_pb2.LinkOpened(worker=record)),
            worker_pb2.LinkResponse(load=make_load(chance)),
            worker_pb2.LinkResponse(cache_events=events),
        ):
            link._deliver(heard)  # noqa: SLF001
    return workers


def make_load(chance: random.Random) -> WorkerLoad:
    return WorkerLoad(
        free_blocks=chance.randrange(10_000),
        queued_tokens=chance.randrange(5_000),
        decode_sequences=chance.randrange(64),
        prefill_ms_per_token=chance.uniform(0.5, 1.5),
        decode_ms_per_step=chance.uniform(5, 15),
        decode_ms_per_sequence=chance.uniform(0.5, 1.5),
    )


def placement_us(num_workers: int, repeats: int = 300) -> list[float]:
    """Microseconds for one placement, the charge included; one figure for each round."""
    chance = random.Random(num_workers)
    workers = make_workers(num_workers, chance)
    links, placement = workers.all(), Placement(workers, "cost", may_join=True)
    wanted = Wanted(_PROMPT, 256)
    rounds = []
    for _ in range(_ROUNDS):
        taken_s = 0.0
        for _ in range(repeats):
            # As many reports as come between two placements, if there are 100 of those in a second.
            for _ in range(max(num_workers // 50, 1)):
                chance.choice(links)._deliver(worker_pb2.LinkResponse(load=make_load(chance)))  # noqa: SLF001
            begin_s = time.perf_counter()
            with placement.place(wanted):
                taken_s += time.perf_counter() - begin_s
        rounds.append(1e6 * taken_s / repeats)
    return rounds


def index_rows(num_blocks: int, num_workers: int = 1000) -> list[Row]:
    chance = np.random.default_rng(0)
    num_conversations = num_blocks // _CONVERSATION_BLOCKS
    # [conversation, bytes of its hashes]
    hashes = np.frombuffer(chance.bytes(HASH_BYTES * _CONVERSATION_BLOCKS * num_conversations), np.uint8)
    hashes = hashes.reshape(num_conversations, -1)
    half = num_workers // 2
    # [side, conversation]: the worker of either side that has it
    holders = chance.integers(half, size=(2, num_conversations)) + np.array([[0], [half]])
    index, update_ms = PrefixIndex(), []
    for side in holders:
        for worker in np.unique(side).tolist():
            stored = hashes[side == worker].tobytes()
            begin_s = time.perf_counter()
            index.add(worker, stored)
            update_ms.append(1000 * (time.perf_counter() - begin_s))
    begin_s = time.perf_counter()
    index.forget(0)
    forget_ms = 1000 * (time.perf_counter() - begin_s)
    return [
        Row("index_blocks", len(index), "blocks"),
        Row("index_memory_mb", index.num_bytes / 1e6, "MB"),
        Row("index_bytes_per_block", index.num_bytes / num_blocks, "bytes"),
        Row("index_events_per_s", 2 * num_blocks / sum(update_ms) * 1000, "events/s"),
        # The one that makes the table grow to its final size.
        Row("index_longest_update_ms", max(update_ms), "ms"),
        Row("index_forget_worker_ms", forget_ms, "ms"),
    ]


def main(
    blocks: Annotated[int, typer.Option(min=1000, help="Blocks in the index.")] = 10_000_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there as well.")] = None,
) -> None:
    """Measure placement among 10, 100 and 1,000 workers, and the index of their prefix caches."""
    console = Console(highlight=False, soft_wrap=True)
    rows = [median_row(f"placement_us_{count}", "us", placement_us(count)) for count in (10, 100, 1000)]
    report = Report(machine_facts(), commit(), [*rows, *index_rows(blocks)])
    print_report(report, console)
    if json_file is not None:
        write_json(report, json_file)


if __name__ == "__main__":
    typer.run(main)
