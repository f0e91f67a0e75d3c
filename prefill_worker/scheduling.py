"""What the next prefill step computes, and what need not be computed: pure decisions."""

from __future__ import annotations

from collections.abc import Sequence


def plan_chunks(remaining: Sequence[int], max_tokens: int) -> list[int]:
    """Tokens of each sequence to compute in the next step, given how many each still needs, oldest first.

    First come, first served under the budget: the oldest prompt is finished before a younger one gets what is left over, so
    several short prompts share a step and a long one is cut into chunks. The list may be shorter than `remaining`.
    """
    chunks = []
    for num_tokens in remaining:
        if max_tokens <= 0:
            break
        chunks.append(min(num_tokens, max_tokens))
        max_tokens -= chunks[-1]
    return chunks


# Fewer tokens are computed sooner than they are asked for and sent.
_MIN_PULLED_TOKENS = 16


def plan_pull(num_computed: int, num_initial_tokens: int, num_decode_tokens: int, block_size: int) -> range:
    """The blocks to fetch from the decode worker, which has the KV of the first `num_decode_tokens` tokens; none where it is
    not worth it. The last token is always computed here: its logits are what the prompt is computed for.
    """
    start = num_computed // block_size
    stop = min(num_decode_tokens, num_initial_tokens - 1) // block_size
    return range(start, stop) if stop * block_size - num_computed >= _MIN_PULLED_TOKENS else range(0)
