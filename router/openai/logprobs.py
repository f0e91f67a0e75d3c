"""Log probabilities in the shapes of the two endpoints. One formatter follows one choice."""

from __future__ import annotations

import math
from typing import Any

from router.generation import ChoiceOutput
from router.options import GenerationSpec
from router.text import Tokenizer
from segue.sampling import FinishReason, GeneratedToken

# JSON has no minus infinity; OpenAI uses this for tokens that cannot come.
_IMPOSSIBLE = -9999.0


def shown_tokens(output: ChoiceOutput, spec: GenerationSpec) -> tuple[GeneratedToken, ...]:
    """Without the end-of-sequence or stop token that closes the choice: it has no text."""
    ends = output.finish_reason is FinishReason.STOP and output.tokens
    if ends and output.tokens[-1].token_id in spec.sampling.stop_token_ids:
        return output.tokens[:-1]
    return output.tokens


def _number(logprob: float | None) -> float:
    return logprob if logprob is not None and math.isfinite(logprob) else _IMPOSSIBLE


class ChatLogprobs:
    def __init__(self, tokenizer: Tokenizer, spec: GenerationSpec) -> None:
        self._vocabulary = tokenizer.vocabulary
        self._spec = spec

    def read(self, output: ChoiceOutput) -> dict[str, Any]:
        """`{"content": [...]}` of this output's tokens."""
        content = [
            self._entry(token.token_id, token.logprob)
            | {"top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in token.top_logprobs]}
            for token in shown_tokens(output, self._spec)
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        data = self._vocabulary.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": _number(logprob), "bytes": list(data)}

    @staticmethod
    def join(parts: list[dict[str, Any]]) -> dict[str, Any]:
        return {"content": [entry for part in parts for entry in part["content"]], "refusal": None}


class CompletionLogprobs:
    def __init__(self, tokenizer: Tokenizer, spec: GenerationSpec) -> None:
        self._vocabulary = tokenizer.vocabulary
        self._spec = spec
        self._detokenizer = tokenizer.detokenizer(continues=spec.continues_text)
        self._offset = 0

    def read(self, output: ChoiceOutput) -> dict[str, Any]:
        """Four lists, one entry for each token; text_offset counts characters of this choice's text."""
        tokens = shown_tokens(output, self._spec)
        return {
            "tokens": [self._name(token.token_id) for token in tokens],
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": [{self._name(i): _number(logprob) for i, logprob in token.top_logprobs} for token in tokens],
            "text_offset": [self._advance(token.token_id) for token in tokens],
        }

    def _advance(self, token_id: int) -> int:
        start = self._offset
        self._offset += len(self._detokenizer.push((token_id,)))
        return start

    def _name(self, token_id: int) -> str:
        """The token's text; a part of a character is spelled in bytes, so that two such tokens stay apart."""
        data = self._vocabulary.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    @staticmethod
    def join(parts: list[dict[str, Any]]) -> dict[str, Any]:
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: [entry for part in parts for entry in part[name]] for name in names}
