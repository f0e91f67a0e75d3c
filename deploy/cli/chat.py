"""`segue chat`: a conversation in the terminal.

The conversation grows by whole turns: a question and its answer, or the part of the answer that came before Ctrl-C. A question
that got no answer is taken back, so that the model never sees two questions in a row.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Annotated

import typer
from rich.console import Console

from deploy.cli.answer import follow, footer
from deploy.cli.console import new_console
from deploy.cli.session import AddressOption, connected, unreachable
from segue.client import Client, GenerateOptions
from segue.client.channel import DEFAULT_ADDRESS
from segue.errors import SegueError, Unreachable

_HELP = "/reset begins anew, /exit or Ctrl-D leaves, Ctrl-C ends an answer"


@dataclass(slots=True)
class Conversation:
    """Messages so far; after the system's, if there is one, user and assistant take turns."""

    system: str | None
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self) -> None:
        self.messages.clear()

    def asked(self, question: str) -> list[dict[str, str]]:
        """What to send for the next answer; the conversation itself grows only by `add`."""
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*before, *self.messages, {"role": "user", "content": question}]

    def add(self, question: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def chat(
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", "-n", min=1, help="At most this many tokens an answer.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="0 always takes the likeliest token.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that make up this share.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed and questions give the same answers.")] = None,
    address: AddressOption = DEFAULT_ADDRESS,
) -> None:
    """Talk with the model, turn by turn."""
    options: GenerateOptions = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    notes = new_console(stderr=True)
    conversation = Conversation(system)
    with connected(address) as client:
        name = ", ".join(model.id for model in client.models())
        notes.print(f"{name} at {address}. {_HELP}.", style="dim", markup=False)
        if sys.stdin.isatty():
            import readline  # noqa: F401  # gives input() line editing and history
        while (question := _read_question()) is not None:
            match question:
                case "":
                    continue
                case "/exit" | "/quit":
                    return
                case "/reset":
                    conversation.reset()
                    notes.print("the conversation begins anew", style="dim")
                case "/help":
                    notes.print(_HELP, style="dim", markup=False)
                case _ if question.startswith("/"):
                    notes.print(f"there is no {question.split()[0]}; {_HELP}", style="yellow", markup=False)
                case _:
                    _answer(client, conversation, question, options, notes)


def _read_question() -> str | None:
    """None when the input is over."""
    try:
        return input("> ").strip()
    except EOFError:
        typer.echo()
        return None
    except KeyboardInterrupt:
        typer.echo()
        return ""


def _answer(client: Client, conversation: Conversation, question: str, options: GenerateOptions, notes: Console) -> None:
    """Prints the answer as it comes and adds the turn. An error is told, and the conversation goes on."""
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        with client.stream(conversation.asked(question), **options) as stream:
            answer = follow(stream, write)
    except KeyboardInterrupt:
        typer.echo()
        notes.print("ended here" if pieces else "no answer; the question is taken back", style="dim")
    except SegueError as error:
        typer.echo()
        shown = unreachable(client.address) if isinstance(error, Unreachable) else error
        notes.print(f"error: {shown.message}", style="red", markup=False)
    else:
        typer.echo()
        notes.print(footer(answer), style="dim", markup=False)
    if pieces:
        conversation.add(question, "".join(pieces))
