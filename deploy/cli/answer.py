"""Follows an answer as it comes, and says in one line how it went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from segue.client import Event, Generation, Output, RequestPath
from segue.client.results import GenerationBuilder


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """A whole answer and what its reader saw of the time it took."""

    generation: Generation
    # From sending the request to the first token.
    ttft_s: float
    # After the first token; None for an answer of one.
    tokens_per_s: float | None


def follow(
    events: Iterable[Event], on_text: Callable[[str], None], clock: Callable[[], float] = time.perf_counter
) -> TimedAnswer:
    """Gives each piece of the first choice's text to `on_text` as it comes. Raises what reading the events raises."""
    answer = GenerationBuilder()
    begin_s = first_s = last_s = clock()
    num_tokens = num_first = 0
    for event in events:
        answer.add(event)
        if isinstance(event, Output):
            if event.tokens:
                last_s = clock()
            if event.tokens and not num_tokens:
                first_s, num_first = last_s, len(event.tokens)
            num_tokens += len(event.tokens)
            if event.text and event.choice == 0:
                on_text(event.text)
    later_s = last_s - first_s
    return TimedAnswer(
        generation=answer.build(),
        ttft_s=first_s - begin_s,
        tokens_per_s=(num_tokens - num_first) / later_s if later_s > 0 else None,
    )


def footer(answer: TimedAnswer) -> str:
    """Tokens, times and path, in one line."""
    usage = answer.generation.usage
    parts = [
        f"{usage.num_prompt_tokens} prompt + {usage.num_output_tokens} output tokens",
        f"first token {answer.ttft_s * 1e3:.0f} ms",
    ]
    if answer.tokens_per_s is not None:
        parts.append(f"{answer.tokens_per_s:.1f} tok/s")
    parts += [describe_path(path) for path in answer.generation.paths[:1]]
    return " · ".join(parts)


def describe_path(path: RequestPath) -> str:
    """`prefill-0 → decode-0 over shm, hand-over 3 ms`, shorter where there was less of a way."""
    if not path.decode_worker:
        return path.prefill_worker
    if path.decode_worker == path.prefill_worker:
        return f"{path.prefill_worker}, both phases"
    text = f"{path.prefill_worker} → {path.decode_worker} over {path.transport}, hand-over {path.handover_s * 1e3:.1f} ms"
    return text if path.attempts == 1 else f"{text}, attempt {path.attempts}"
