"""Which pair of workers serves a sequence: small pure functions over plain facts.

A policy sees what is charged to each worker now, this sequence excluded; the caller charges its choice at once, so that a burst
spreads even before any worker has reported load.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from segue.errors import InvalidRequest, NoWorker


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    worker_id: str
    roles: frozenset[str]
    # Only workers with equal fingerprints can exchange KV.
    layout_fingerprint: str
    # Prompt plus output tokens that fit its KV memory.
    capacity_tokens: int
    # Prompt tokens of the sequences that this router has it prefilling.
    prefill_tokens: int = 0
    # Sequences that this router has on its decode side, reserved or running.
    decode_sequences: int = 0
    # KV blocks that are not leased, as it last said.
    available_blocks: int = 0


Pair = tuple[WorkerFacts, WorkerFacts]
Policy = Callable[[Sequence[Pair]], Pair]


def least_loaded(pairs: Sequence[Pair]) -> Pair:
    """The prefill worker with the fewest prompt tokens ahead, with the decode worker that has the fewest sequences, then the
    most free memory. Ties go to the first by name."""

    def load(pair: Pair) -> tuple[int, int, int, str, str]:
        prefill, decode = pair
        return (
            prefill.prefill_tokens,
            decode.decode_sequences,
            -decode.available_blocks,
            prefill.worker_id,
            decode.worker_id,
        )

    return min(pairs, key=load)


def place(
    workers: Sequence[WorkerFacts],
    num_prompt_tokens: int,
    max_tokens: int,
    policy: Policy = least_loaded,
    suspects: Set[str] = frozenset(),
) -> Pair:
    """The (prefill, decode) pair for a sequence. A worker with both roles is only paired with itself: handing over within it
    costs nothing. Of the pairs that can serve it, the policy sees those with the fewest `suspects`, which are worker ids.

    Raises NoWorker when a role is missing or no two workers fit together, InvalidRequest when the sequence fits in none.
    """
    pairs = [
        (prefill, decode)
        for prefill in workers
        if "prefill" in prefill.roles
        for decode in workers
        if "decode" in decode.roles
        and prefill.layout_fingerprint == decode.layout_fingerprint
        and (prefill is decode or "decode" not in prefill.roles)
    ]
    if not pairs:
        missing = [role for role in ("prefill", "decode") if not any(role in worker.roles for worker in workers)]
        raise NoWorker(
            f"no {' and no '.join(missing)} worker is ready" if missing else "no prefill and decode worker fit together"
        )
    fitting = [
        (prefill, decode)
        for prefill, decode in pairs
        if num_prompt_tokens <= prefill.capacity_tokens and num_prompt_tokens + max_tokens <= decode.capacity_tokens
    ]
    if not fitting:
        raise InvalidRequest("max_tokens", "prompt and output exceed the KV memory of every worker")

    def num_suspects(pair: Pair) -> int:
        return len(suspects & {worker.worker_id for worker in pair})

    fewest = min(map(num_suspects, fitting))
    return policy([pair for pair in fitting if num_suspects(pair) == fewest])
