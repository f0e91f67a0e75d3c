"""One prompt, answered as the tokens come, and where its time went."""

from __future__ import annotations

from rich.console import Console

from deploy.cli.answer import follow, footer
from deploy.waiting import in_daemon_thread
from segue.client import Client, Prompt
from segue.errors import RequestError

_QUESTION = "In one sentence, why is the sky blue?"
_TEXT = "The sky is blue because"
_MAX_TOKENS = 64
_TIMEOUT_S = 120.0


async def answer_sample(address: str, console: Console) -> None:
    """Raises a SegueError when there is no answer."""
    await in_daemon_thread(lambda: _ask(address, console))


def _ask(address: str, console: Console) -> None:
    with Client(address) as client:
        try:
            _answer(client, [{"role": "user", "content": _QUESTION}], _QUESTION, console)
        except RequestError:  # a base model has no chat template
            _answer(client, _TEXT, _TEXT, console)


def _answer(client: Client, prompt: Prompt, shown: str, console: Console) -> None:
    pieces = iter((f"\n{shown}\n",))

    def show(text: str) -> None:
        console.print(next(pieces, ""), style="dim", end="", markup=False)  # above the first piece, once there is one
        console.print(text, end="", markup=False)

    with client.stream(prompt, temperature=0, max_tokens=_MAX_TOKENS, timeout_s=_TIMEOUT_S) as events:
        answer = follow(events, show)
    num_bytes = answer.generation.path.transferred_bytes
    moved = f" · {num_bytes / 2**20:.1f} MiB of KV cache sent" if num_bytes else ""
    console.print(f"\n{footer(answer)}{moved}", style="dim", markup=False)
