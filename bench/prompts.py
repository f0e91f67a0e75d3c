"""Prompts to measure with."""

from __future__ import annotations

import random


def random_prompts(num_prompts: int, num_tokens: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Token ids drawn evenly from the vocabulary, the same for the same seed. No two prompts begin alike, so that none
    hits what another left in a prefix cache. Raises ValueError when the vocabulary is too small for that."""
    if num_prompts > vocab_size:
        raise ValueError(f"{num_prompts} prompts cannot all begin differently with a vocabulary of {vocab_size}")
    draw = random.Random(seed)
    first_ids = draw.sample(range(vocab_size), num_prompts)
    return [[first_id, *draw.choices(range(vocab_size), k=num_tokens - 1)] for first_id in first_ids]
