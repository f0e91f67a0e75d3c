"""From what a caller passes to the messages of the wire. Pure; ranges are checked by the router, types here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from segue.errors import InvalidRequest
from segue.v1 import inference_pb2 as pb

# Text, token ids, or the messages of a chat: mappings with `role` (system, user, assistant) and `content`.
Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen. What is left out or None takes the default named beside it."""

    # As many as the context has room for.
    max_tokens: int | None
    # The answer cannot end before this many tokens: 0.
    min_tokens: int | None
    # 0 is greedy: 1.
    temperature: float | None
    # In (0, 1]: 1.
    top_p: float | None
    # 0 means all: 0.
    top_k: int | None
    # In [0, 1]: 0.
    min_p: float | None
    # In [-2, 2], over generated tokens: 0.
    presence_penalty: float | None
    # In [-2, 2], over generated tokens: 0.
    frequency_penalty: float | None
    # Above 0, over prompt and generated tokens: 1.
    repetition_penalty: float | None
    # Token id to a value in [-100, 100] that is added to its logit: none.
    logit_bias: Mapping[int, float] | None
    # The same seed, prompt and options give the same tokens: drawn at random.
    seed: int | None
    # One string or up to 16; the answer ends before the first that appears: none.
    stop: str | Sequence[str] | None
    # Tokens that end the answer: only the model's own.
    stop_token_ids: Sequence[int] | None
    # Do not end at the end-of-sequence token: False.
    ignore_eos: bool | None
    # Report each token's log probability, and those of this many likeliest tokens, 0 to 20: none.
    num_logprobs: int | None


class GenerateOptions(SamplingOptions, total=False):
    """All that `generate` and `stream` take beside the prompt."""

    # The model that the cluster serves.
    model: str | None
    # Independent continuations, 1 to 16: 1.
    num_choices: int | None
    # Of requests that wait, one with a lower value is served first, -100 to 100: 0.
    priority: int | None
    # Seconds until DeadlineExceeded, retries included; None waits for ever: the client's own.
    timeout_s: float | None


_SAMPLING_NAMES = SamplingOptions.__annotations__.keys()
_KNOWN_NAMES = GenerateOptions.__annotations__.keys()


def generate_request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    """Raises InvalidRequest, naming the field, for a value that the message cannot hold, TypeError for an unknown option."""
    if unknown := options.keys() - _KNOWN_NAMES:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}; there are: {', '.join(_KNOWN_NAMES)}")
    request = pb.GenerateRequest()
    _set(request, "model", options.get("model"))
    _set(request, "num_choices", options.get("num_choices"))
    _set(request, "priority", options.get("priority"))
    _set_prompt(request, prompt)
    for name, value in options.items():
        if name in _SAMPLING_NAMES:
            _set(request.sampling, name, [value] if name == "stop" and isinstance(value, str) else value)
    return request


def tokenize_request(prompt: str | Sequence[Mapping[str, str]], model: str | None) -> pb.TokenizeRequest:
    """Raises InvalidRequest, naming the field, for a value that the message cannot hold."""
    request = pb.TokenizeRequest()
    _set(request, "model", model)
    if isinstance(prompt, str):
        _set(request, "text", prompt)
    else:
        _set_chat(request.chat, prompt)
    return request


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        _set(request, "text", prompt)
    elif isinstance(prompt, bytes | Mapping) or not hasattr(prompt, "__iter__"):
        raise InvalidRequest("prompt", f"must be text, token ids or messages, not {type(prompt).__name__}")
    elif not (items := list(prompt)):
        raise InvalidRequest("prompt", "is empty")
    elif isinstance(items[0], Mapping):
        _set_chat(request.chat, items)
    else:
        _set(request.token_ids, "ids", items, said_as="prompt")


def _set_chat(chat: pb.Chat, messages: Sequence[Any]) -> None:
    if not messages:
        raise InvalidRequest("messages", "is empty")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
            raise InvalidRequest(where, "must have `role` and `content`, and nothing else")
        added = chat.messages.add()
        for part in ("role", "content"):
            if message[part] is None:
                raise InvalidRequest(f"{where}.{part}", "must be text, not None")
            _set(added, part, message[part], said_as=f"{where}.{part}")


def _set(message: Any, name: str, value: Any, said_as: str = "") -> None:
    """None leaves the field unset; lists and mappings are filled in."""
    if value is None:
        return
    try:
        if isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequest(said_as or name, f"cannot be {value!r:.80}: {error}") from None
