"""The JSON of answers, for both endpoints, streamed and whole. Nothing here waits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from router.explain import path_json
from router.generation import ChoiceOutput, GenerationDone
from router.openai.logprobs import ChatLogprobs, CompletionLogprobs
from router.options import GenerationSpec
from router.text import Tokenizer

# Made once: json.dumps with these options would make an encoder for each token.
to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class _ChatChoice:
    """One choice of a chat completion, read output by output."""

    logprobs_class = ChatLogprobs

    def __init__(self, index: int) -> None:
        self._index = index
        self._has_begun = False

    def chunk(self, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        delta = {} if self._has_begun else {"role": "assistant", "content": ""}
        if text:
            delta["content"] = text
        self._has_begun = True
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def whole(self, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": self._index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}


class _CompletionChoice:
    """One choice of a text completion. A chunk and the whole look the same."""

    logprobs_class = CompletionLogprobs

    def __init__(self, index: int) -> None:
        self._index = index

    def chunk(self, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    whole = chunk


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Names that differ between the two endpoints."""

    api: str
    id_prefix: str
    object_name: str
    chunk_object_name: str
    choice_class: type[_ChatChoice | _CompletionChoice]


CHAT = Endpoint("chat", "chatcmpl", "chat.completion", "chat.completion.chunk", _ChatChoice)
COMPLETION = Endpoint("completions", "cmpl", "text_completion", "text_completion", _CompletionChoice)


class _ChoiceRecord:
    """All that was seen of one choice."""

    def __init__(self, endpoint: Endpoint, index: int, tokenizer: Tokenizer, spec: GenerationSpec) -> None:
        self._choice = endpoint.choice_class(index)
        wants_logprobs = spec.sampling.num_logprobs is not None
        self._logprobs = self._choice.logprobs_class(tokenizer, spec) if wants_logprobs else None
        self._texts: list[str] = []
        self._parts: list[dict[str, Any]] = []
        self._finish_reason: str | None = None

    def chunk(self, output: ChoiceOutput) -> dict[str, Any] | None:
        """The choice's part of a streamed chunk; None when there is nothing to say yet."""
        if not output.text and output.finish_reason is None and self._logprobs is None:
            return None
        logprobs = None if self._logprobs is None else self._logprobs.read(output)
        return self._choice.chunk(output.text, logprobs, output.finish_reason and output.finish_reason.value)

    def add(self, output: ChoiceOutput) -> None:
        self._texts.append(output.text)
        if self._logprobs is not None:
            self._parts.append(self._logprobs.read(output))
        if output.finish_reason is not None:
            self._finish_reason = output.finish_reason.value

    def whole(self) -> dict[str, Any]:
        logprobs = None if self._logprobs is None else self._logprobs.join(self._parts)
        return self._choice.whole("".join(self._texts), logprobs, self._finish_reason)


@dataclass(frozen=True, slots=True)
class Extras:
    """What the client asked for besides the answer. The usage of a whole answer is always told."""

    usage_chunk: bool = False
    paths: bool = False


class Answer:
    """Builds the answer to one request, whole (`add`, then `whole`) or in chunks (`chunk`, then `last_chunk`)."""

    fingerprint: ClassVar[str] = "segue"

    def __init__(
        self,
        endpoint: Endpoint,
        answer_id: str,
        model: str,
        created_unix_s: int,
        specs: Sequence[GenerationSpec],
        tokenizer: Tokenizer,
        extras: Extras,
    ) -> None:
        """`specs`: one for each prompt. Choices are numbered through: those of the first prompt, of the second, and so on."""
        self._endpoint = endpoint
        self._envelope = {
            "id": f"{endpoint.id_prefix}-{answer_id}",
            "created": created_unix_s,
            "model": model,
            "system_fingerprint": self.fingerprint,
        }
        self._records = {
            (prompt, choice): _ChoiceRecord(endpoint, prompt * spec.num_choices + choice, tokenizer, spec)
            for prompt, spec in enumerate(specs)
            for choice in range(spec.num_choices)
        }
        self._extras = extras
        # By the number of the prompt.
        self._done: dict[int, GenerationDone] = {}

    def add(self, prompt: int, event: ChoiceOutput | GenerationDone) -> None:
        if isinstance(event, GenerationDone):
            self._done[prompt] = event
        else:
            self._records[prompt, event.choice].add(event)

    def whole(self) -> dict[str, Any]:
        choices = [record.whole() for record in self._records.values()]
        whole = self._envelope | {"object": self._endpoint.object_name, "choices": choices, "usage": self._usage()}
        return whole | self._paths()

    def chunk(self, prompt: int, event: ChoiceOutput | GenerationDone) -> dict[str, Any] | None:
        """One chunk; None when this event shows nothing."""
        if isinstance(event, GenerationDone):
            self._done[prompt] = event
            return None
        choice = self._records[prompt, event.choice].chunk(event)
        if choice is None:
            return None
        chunk = self._envelope | {"object": self._endpoint.chunk_object_name, "choices": [choice]}
        return chunk | {"usage": None} if self._extras.usage_chunk else chunk

    def last_chunk(self) -> dict[str, Any] | None:
        """One without choices, for a client that asked for what it holds."""
        if not (self._extras.usage_chunk or self._extras.paths):
            return None
        usage = {"usage": self._usage()} if self._extras.usage_chunk else {}
        return self._envelope | {"object": self._endpoint.chunk_object_name, "choices": []} | usage | self._paths()

    def _paths(self) -> dict[str, Any]:
        """Of all choices, in their order."""
        if not self._extras.paths:
            return {}
        return {"paths": [path_json(path) for _, done in sorted(self._done.items()) for path in done.paths_to_pb()]}

    def _usage(self) -> dict[str, Any]:
        all_done = self._done.values()
        num_prompt = sum(done.num_prompt_tokens for done in all_done)
        num_output = sum(done.num_output_tokens for done in all_done)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(done.num_cached_tokens for done in all_done)},
        }


# Before the first event: so long a client that goes on with a stream that broke shall wait before.
SSE_RETRY = b"retry: 1000\n"


def sse(payload: dict[str, Any], event_id: str = "") -> bytes:
    """One server-sent event."""
    begin = f"id: {event_id}\n" if event_id else ""
    return f"{begin}data: {to_json(payload)}\n\n".encode()


SSE_DONE = b"data: [DONE]\n\n"
