"""The request bodies. They check types; ranges and the model's limits are checked in router.options, for both APIs alike."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from router.options import GenerationOptions
from router.text import ChatMessage
from segue.errors import InvalidRequest

MAX_COMPLETION_LOGPROBS = 5

# What is taken, where a validator turns it into something narrower.
_STRINGS = {"type": "array", "items": {"type": "string"}}
_INTEGERS = {"type": "array", "items": {"type": "integer"}}
_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}


def _problem(text: str) -> PydanticCustomError:
    return PydanticCustomError("segue", "{problem}", {"problem": text})


def _stop_list(value: object) -> object:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) for item in strings):
        raise _problem("must be a string or a list of strings")
    return strings


def _token_biases(value: object) -> dict[int, object]:
    if not isinstance(value, dict):
        raise _problem("must be an object of token ids and numbers")
    try:
        return {int(token_id): bias for token_id, bias in value.items()}
    except ValueError:
        raise _problem("keys must be token ids") from None


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _prompt_list(value: object) -> list[str] | list[list[int]]:
    """All four forms that OpenAI takes, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if all(_is_token_id(item) for item in value):
            return [value]
        if all(isinstance(item, list) and all(_is_token_id(inner) for inner in item) for item in value):
            return value
    if value == []:
        raise _problem("is empty")
    raise _problem("must be a string, a list of strings, a list of token ids or a list of such lists")


def _content_text(value: object) -> str:
    """A string, or text parts, which are joined with line breaks."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _problem("must be a string or a list of text parts")
    for part in value:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise _problem('only parts like {"type": "text", "text": "..."} are supported')
    return "\n".join(part["text"] for part in value)


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class _GenerationBody(_Body):
    """What both endpoints take."""

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[
        dict[int, float],
        BeforeValidator(_token_biases),
        WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}}),
    ] = Field(default_factory=dict)
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(_stop_list), WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS]})] = Field(
        default_factory=list
    )
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    # As in vLLM: lower is served first.
    priority: int = 0

    def _options(self, max_tokens: int | None, num_logprobs: int | None) -> GenerationOptions:
        return GenerationOptions(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            num_logprobs=num_logprobs,
            num_choices=self.n,
        )


class CompletionRequest(_GenerationBody):
    prompt: Annotated[
        list[str | list[int]],
        BeforeValidator(_prompt_list),
        WithJsonSchema({"anyOf": [{"type": "string"}, _STRINGS, _INTEGERS, {"type": "array", "items": _INTEGERS}]}),
    ]
    logprobs: int | None = None
    best_of: int | None = None

    def options(self) -> GenerationOptions:
        """Raises InvalidRequest for what only this endpoint knows."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest("best_of", "is not supported but for the value of n; leave it out")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_COMPLETION_LOGPROBS:
            raise InvalidRequest("logprobs", f"must be 0 to {MAX_COMPLETION_LOGPROBS}, not {self.logprobs}")
        return self._options(self.max_tokens, self.logprobs)

    def names(self) -> dict[str, str]:
        """Client's name of each field that is called otherwise in Segue."""
        return {"num_choices": "n"}


class _NoFields(_Body):
    """An object of which nothing is supported."""


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str, BeforeValidator(_content_text), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]})
    ]
    # Clients send an earlier answer back as they got it; these change nothing while they are empty.
    tool_calls: list[_NoFields] = Field(default_factory=list, max_length=0)
    annotations: list[Any] = Field(default_factory=list)

    def to_chat_message(self) -> ChatMessage:
        """`developer` is OpenAI's newer word for `system`, which chat templates do not know."""
        return ChatMessage("system" if self.role == "developer" else self.role, self.content)


class ChatRequest(_GenerationBody):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

    def options(self) -> GenerationOptions:
        """Raises InvalidRequest for what only this endpoint knows."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs", "needs logprobs to be true")
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise InvalidRequest("max_completion_tokens", "differs from max_tokens, the old name of the same limit; give one")
        return self._options(next(iter(limits), None), (self.top_logprobs or 0) if self.logprobs else None)

    def names(self) -> dict[str, str]:
        """Client's name of each field that is called otherwise in Segue."""
        names = {"num_choices": "n", "prompt": "messages", "logprobs": "top_logprobs"}
        return names if self.max_completion_tokens is None else names | {"max_tokens": "max_completion_tokens"}
