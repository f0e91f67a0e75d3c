"""What the next prefill step computes: a pure decision."""

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
