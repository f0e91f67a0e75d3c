"""`segue generate`: one answer to one prompt, printed as it is made."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from deploy.cli.answer import TimedAnswer, follow, footer
from deploy.cli.console import errors_reported, new_console
from deploy.cli.session import AddressOption, connected
from segue.client import GenerateOptions
from segue.client.channel import DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S
from segue.client.requests import Prompt
from segue.errors import InvalidRequest


def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads it from standard input.")],
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-n", min=1, help="At most this many tokens.")] = 256,
    temperature: Annotated[
        float | None, typer.Option("--temperature", "-t", help="0 always takes the likeliest token.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that make up this share.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many likeliest tokens; 0 from all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Leave out tokens below this share of the likeliest one's.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 makes repeating less likely.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed and options give the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model says that it is done.")] = False,
    chat: Annotated[
        bool, typer.Option("--chat/--raw", help="Ask through the model's chat template, or continue the text.")
    ] = True,
    system: Annotated[str | None, typer.Option(help="What the model is told before the prompt; only with --chat.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with text, tokens, path and timing.")] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.001, help="Give up after this many seconds.")
    ] = DEFAULT_TIMEOUT_S,
    address: AddressOption = DEFAULT_ADDRESS,
) -> None:
    """Answer one prompt, printing the text as it is made and then one line on how it went.

    The text goes to standard output, the line to standard error.
    """
    options: GenerateOptions = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop,
        "ignore_eos": ignore_eos,
        "timeout_s": timeout_s,
    }
    with errors_reported():
        asked = _prompt(_read_stdin() if prompt == "-" else prompt, system, is_chat=chat)
    with connected(address) as client, client.stream(asked, **options) as stream:
        answer = follow(stream, _ignore if as_json else _write)
    if as_json:
        typer.echo(json.dumps(_as_json(answer), ensure_ascii=False))
        return
    typer.echo()
    new_console(stderr=True).print(footer(answer), style="dim", markup=False)


def _prompt(text: str, system: str | None, *, is_chat: bool) -> Prompt:
    if not is_chat:
        if system is not None:
            raise InvalidRequest("--system", "needs the chat template; leave out --raw")
        return text
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": text}]


def _read_stdin() -> str:
    try:
        return typer.get_binary_stream("stdin").read().decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest("prompt", f"standard input is not UTF-8: {error}") from None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _ignore(_text: str) -> None:
    pass


def _as_json(answer: TimedAnswer) -> dict[str, Any]:
    generation = answer.generation
    choice = generation.choices[0]
    return {
        "request_id": generation.request_id,
        "model": generation.model,
        "text": choice.text,
        "token_ids": choice.token_ids,
        "finish_reason": choice.finish_reason.value if choice.finish_reason else None,
        "num_prompt_tokens": generation.usage.num_prompt_tokens,
        "num_output_tokens": generation.usage.num_output_tokens,
        "ttft_s": answer.ttft_s,
        "tokens_per_s": answer.tokens_per_s,
        "path": asdict(generation.path) if generation.paths else None,
    }
