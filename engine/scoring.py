"""Logits at every position of a text and not only at its end: for calibration and for perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from engine.block_pool import Lease
from engine.kv_cache import KVCache
from engine.model import Decoder
from engine.sequence import Sequence
from engine.step import Chunk, prepare_step
from segue.kv_layout import KVLayout
from segue.sampling import SamplingParams

# Tokens computed at a time: their logits over a vocabulary of 150,000 take 150 MB.
STEP_TOKENS = 256


def cache_for(num_tokens: int, layout: KVLayout) -> KVCache:
    """An empty cache, on the host, that holds one sequence of `num_tokens`, in blocks 0, 1, ..."""
    num_blocks = layout.num_blocks_for(num_tokens)
    return KVCache(torch.zeros(num_blocks * layout.block_bytes, dtype=torch.uint8), layout, num_blocks)


def step_logits(decoder: Decoder, layout: KVLayout, token_ids: list[int]) -> Iterator[torch.Tensor]:
    """Logits [tokens of the step, vocab] float32 of one step after the other; row i of all holds what is expected to follow
    token i. `decoder` computes into a cache of `cache_for`. A result is valid until the next one is asked for."""
    num_blocks = layout.num_blocks_for(len(token_ids))
    sequence = Sequence("text", token_ids, SamplingParams(max_tokens=1), lease=Lease(range(num_blocks), num_cached=0))
    while sequence.num_uncomputed:
        num_tokens = min(STEP_TOKENS, sequence.num_uncomputed)
        with torch.inference_mode():
            step = prepare_step([Chunk(sequence, num_tokens)], layout)
            logits = decoder.forward(replace(step, sampled_rows=torch.arange(num_tokens)))
        sequence.num_computed += num_tokens
        yield logits


@dataclass(frozen=True, slots=True)
class Score:
    # The natural logarithm of the probability of tokens 1, 2, ..., each given those before it. [tokens - 1] float32
    log_likelihoods: torch.Tensor
    # The tokens that were likeliest at these places. [tokens - 1] int64
    likeliest: torch.Tensor

    @property
    def perplexity(self) -> float:
        return math.exp(-float(self.log_likelihoods.mean(dtype=torch.float64)))


def score(decoder: Decoder, layout: KVLayout, token_ids: list[int]) -> Score:
    """How well the model expects this text of at least two tokens. `decoder` as for step_logits."""
    targets = torch.tensor(token_ids[1:])[:, None]
    log_likelihoods: list[torch.Tensor] = []
    likeliest: list[torch.Tensor] = []
    for number, logits in enumerate(step_logits(decoder, layout, token_ids)):
        rows = targets[number * STEP_TOKENS :][: len(logits)]
        # Nothing is known to follow the last token.
        known = logits[: len(rows)].cpu()
        log_likelihoods.append(known.log_softmax(-1).gather(1, rows)[:, 0])
        likeliest.append(known.argmax(-1))
    return Score(torch.cat(log_likelihoods), torch.cat(likeliest))
