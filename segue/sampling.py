"""What one sequence asks of the sampler, and what it gives back. Shared by the router, both workers and the engine."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from segue.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 64


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Checked on construction: InvalidRequest names the field that is out of range.

    `stop_token_ids` holds every token that ends the sequence, the model's end-of-sequence tokens included unless the
    client asked to ignore them. `num_logprobs` is None for no log probabilities, 0 for the sampled token's alone.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "must be at least 1")
        _check("min_tokens", self.min_tokens, 0 <= self.min_tokens <= self.max_tokens, "must be 0 to max_tokens")
        _check("temperature", self.temperature, 0 <= self.temperature <= 100, "must be 0 to 100")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "must be above 0 and at most 1")
        _check("top_k", self.top_k, 0 <= self.top_k < 2**31, "must be 0 (all) or more")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "must be 0 to 1")
        _check("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "must be -2 to 2")
        _check("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "must be -2 to 2")
        _check("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty <= 100, "must be above 0")
        _check("seed", self.seed, 0 <= self.seed < 2**64, "must be 0 to 2**64 - 1")
        _check(
            "logit_bias",
            len(self.logit_bias),
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            f"at most {MAX_LOGIT_BIAS} tokens",
        )
        for token_id, bias in self.logit_bias.items():
            _check("logit_bias", bias, token_id >= 0 and -100 <= bias <= 100, "token ids map to -100 to 100")
        many = len(self.stop_token_ids)
        _check("stop_token_ids", many, many <= MAX_STOP_TOKEN_IDS, f"at most {MAX_STOP_TOKEN_IDS} tokens")
        if self.num_logprobs is not None:
            _check("logprobs", self.num_logprobs, 0 <= self.num_logprobs <= MAX_LOGPROBS, f"must be 0 to {MAX_LOGPROBS}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


def _check(name: str, value: float, holds: bool, rule: str) -> None:
    if not holds or not math.isfinite(value):
        raise InvalidRequest(name, f"{rule}, not {value}")


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One sampled token. `logprob` is the natural logarithm of the model's own probability, before temperature,
    penalties and filters; None unless asked for. `top_logprobs` holds (token id, logprob), likeliest first."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
