"""How much of a prompt's transfer its own computation hides: a real cluster of one prefill and one decode worker, and a client.

A layer's KV travels while the next is computed. What is left of it when the first token is there is *exposed*: the hand-over.
Its counterpart is the same KV moved at once, with nothing computed beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from bench.local_cluster import LocalCluster
from bench.overhead import Timing, Timings
from bench.overhead import measure as measure_requests
from bench.prompts import random_prompts
from bench.report import Row, median_row
from bench.transfer_cases import Case
from bench.transfer_pair import TransferPair
from engine.layout import kv_layout
from segue.client import AsyncClient
from segue.config import EngineSettings
from segue.models.config import ModelConfig
from segue.models.store import resolve

NUM_PROMPT_TOKENS = 1000
NUM_REQUESTS = 10
TARGET_HIDDEN_SHARE = 0.9


async def measure_hidden(model: str, note: Callable[[str], None]) -> list[Row]:
    note("starting a cluster")
    async with LocalCluster(model, threads=1) as cluster, AsyncClient(cluster.grpc_address) as client:
        vocab_size = (await client.models())[0].vocab_size
        prompts = random_prompts(NUM_REQUESTS + 1, NUM_PROMPT_TOKENS, vocab_size)
        [timings] = await measure_requests([client], prompts, note)
    transport = timings.timings[0].path.transport
    layout = kv_layout(ModelConfig.from_dir(resolve(model).path), EngineSettings(), "bench")
    async with TransferPair(Case(layout, layout.num_blocks_for(NUM_PROMPT_TOKENS))) as pair:
        alone_s = [await pair.transfer_s(transport) for _ in range(NUM_REQUESTS)]
    return hidden_rows(timings, alone_s)


def hidden_rows(timings: Timings, alone_s: Sequence[float]) -> list[Row]:
    """`alone_s` are the seconds of the same transfer with nothing to hide behind."""
    alone_ms, exposed_ms = statistics.median(alone_s) * 1e3, timings.handover_ms
    shares = [1 - exposed / alone_ms for exposed in exposed_ms]
    return [
        median_row(f"transfer_hidden_share_{NUM_PROMPT_TOKENS}", "share", shares),
        median_row(f"transfer_exposed_ms_{NUM_PROMPT_TOKENS}", "ms", exposed_ms),
        median_row(f"transfer_alone_ms_{NUM_PROMPT_TOKENS}", "ms", [seconds * 1e3 for seconds in alone_s]),
        median_row("handover_extra_ms", "ms", [extra_ms(timing) for timing in timings.timings]),
    ]


def extra_ms(timing: Timing) -> float:
    """How much longer the client waits for the second token, the first of decode, than for later ones."""
    first_s, *later_s = timing.gaps_s
    return (first_s - statistics.median(later_s)) * 1e3


def verdicts(rows: Mapping[str, Row]) -> list[str]:
    share, extra = rows[f"transfer_hidden_share_{NUM_PROMPT_TOKENS}"].value, rows["handover_extra_ms"].value
    exposed, least = rows[f"transfer_exposed_ms_{NUM_PROMPT_TOKENS}"].value, TARGET_HIDDEN_SHARE
    return [
        f"hidden share of a transfer {share:.3f}; target at least {least:.2f}: {met(share >= least)}",
        f"hand-over {extra:.2f} ms over one decode step; target at most the exposed {exposed:.2f} ms: {met(extra <= exposed)}",
    ]


def met(is_met: bool) -> str:
    return "met" if is_met else "missed"
