"""What changes a sequence's logits before sampling: bias, penalties and tokens that are not allowed yet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from segue.sampling import SamplingParams


class Penalties:
    """Keeps counts of the tokens seen so far, updated by the new ones only, so that a step costs no walk over the sequence.

    The state is a function of the tokens alone: built anew from them it is the same.
    """

    __slots__ = ("_bias", "_bias_ids", "_counts", "_num_counted", "_num_prompt_tokens", "_params", "_seen", "_stop_ids")

    def __init__(self, params: SamplingParams, num_prompt_tokens: int, vocab_size: int) -> None:
        self._params = params
        self._num_prompt_tokens = num_prompt_tokens
        self._num_counted = 0
        # How often each token was generated, and whether it appears in prompt or output. [vocab]
        self._counts: npt.NDArray[np.float32] = np.zeros(vocab_size, np.float32)
        self._seen: npt.NDArray[np.bool_] = np.zeros(vocab_size, np.bool_)
        bias = {token_id: value for token_id, value in params.logit_bias.items() if token_id < vocab_size}
        self._bias_ids = np.fromiter(bias.keys(), np.int64, len(bias))
        self._bias = np.fromiter(bias.values(), np.float32, len(bias))
        self._stop_ids = [token_id for token_id in params.stop_token_ids if token_id < vocab_size]

    @staticmethod
    def are_needed(params: SamplingParams) -> bool:
        """Whether these parameters can change any logit."""
        return bool(
            params.logit_bias
            or params.repetition_penalty != 1.0
            or params.presence_penalty
            or params.frequency_penalty
            or params.min_tokens
        )

    def apply(self, logits: npt.NDArray[np.float32], token_ids: Sequence[int]) -> None:
        """Changes `logits` [vocab] in place, as the token after `token_ids` asks for."""
        self._count(token_ids)
        params = self._params
        logits[self._bias_ids] += self._bias
        if params.repetition_penalty != 1.0:
            penalty = np.float32(params.repetition_penalty)
            seen = logits[self._seen]
            logits[self._seen] = np.where(seen < 0, seen * penalty, seen / penalty)
        if params.frequency_penalty:
            logits -= np.float32(params.frequency_penalty) * self._counts
        if params.presence_penalty:
            logits -= np.float32(params.presence_penalty) * (self._counts > 0)
        if len(token_ids) - self._num_prompt_tokens < params.min_tokens:
            logits[self._stop_ids] = -np.inf

    def _count(self, token_ids: Sequence[int]) -> None:
        self._seen[token_ids[self._num_counted :]] = True
        np.add.at(self._counts, token_ids[max(self._num_counted, self._num_prompt_tokens) :], np.float32(1))
        self._num_counted = len(token_ids)
