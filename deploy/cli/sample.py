"""One prompt, answered as the tokens come, and where its time went."""

from __future__ import annotations

import time

from rich.console import Console

from segue import AsyncClient, Completed, Output, Prompt, RequestPath
from segue.errors import RequestError

_QUESTION = "In one sentence, why is the sky blue?"
_CHAT: Prompt = [{"role": "user", "content": _QUESTION}]
_TEXT: Prompt = "The sky is blue because"
_MAX_TOKENS = 64
_TIMEOUT_S = 120.0


async def answer_sample(address: str, console: Console) -> None:
    """Raises a SegueError when there is no answer."""
    async with AsyncClient(address) as client:
        try:
            await _answer(client, _CHAT, console)
        except RequestError:  # a base model has no chat template
            await _answer(client, _TEXT, console)


async def _answer(client: AsyncClient, prompt: Prompt, console: Console) -> None:
    question = prompt if isinstance(prompt, str) else _QUESTION
    sent_s, first_s, last_s, completed = time.monotonic(), 0.0, 0.0, None
    async with client.stream(prompt, temperature=0, max_tokens=_MAX_TOKENS, timeout_s=_TIMEOUT_S) as events:
        async for event in events:
            match event:
                case Output():
                    last_s = time.monotonic()
                    if not first_s:
                        first_s = last_s
                        console.print(f"\n{question}", style="dim", markup=False)
                    console.print(event.text, end="", markup=False)
                case Completed():
                    completed = event
    console.print()
    if completed is not None:
        rate = (completed.num_output_tokens - 1) / (last_s - first_s) if last_s > first_s else 0.0
        console.print(
            f"{completed.num_prompt_tokens} tokens in, {completed.num_output_tokens} out: first after "
            f"{1000 * (first_s - sent_s):.0f} ms, then {rate:.0f} tokens/s; {describe_path(completed.paths[0])}",
            style="dim",
            markup=False,
        )


def describe_path(path: RequestPath) -> str:
    """Which workers served a request, and how its KV cache got from one to the other."""
    if not path.decode_worker:
        return f"{path.prefill_worker} alone"
    if path.transport == "local":
        return f"{path.decode_worker} did both phases"
    moved = f"{path.transferred_bytes / 2**20:.1f} MiB of KV cache over {path.transport} in {1000 * path.handover_s:.0f} ms"
    return f"{path.prefill_worker} → {path.decode_worker}, {moved}"
