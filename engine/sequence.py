"""One sequence as the engine sees it: its tokens, how far their KV is computed, and the blocks that hold it."""

from __future__ import annotations

from collections.abc import Hashable

from engine.block_pool import Lease
from engine.penalties import Penalties
from segue.sampling import FinishReason, GeneratedToken, SamplingParams


class Sequence:
    """Invariant: num_computed <= len(token_ids); the last token's KV is computed in the step that samples the next one.

    A sequence may start with tokens that were generated elsewhere: num_prompt_tokens < len(token_ids).
    """

    __slots__ = (
        "key",
        "lease",
        "num_computed",
        "num_initial_tokens",
        "num_prompt_tokens",
        "penalties",
        "sampling",
        "token_ids",
    )

    def __init__(
        self,
        key: Hashable,
        token_ids: list[int],
        sampling: SamplingParams,
        *,
        num_prompt_tokens: int | None = None,
        lease: Lease | None = None,
        num_computed: int = 0,
    ) -> None:
        self.key = key
        # Prompt, then what was generated so far.
        self.token_ids = token_ids
        self.num_prompt_tokens = len(token_ids) if num_prompt_tokens is None else num_prompt_tokens
        # The prompt and what was generated elsewhere.
        self.num_initial_tokens = len(token_ids)
        self.sampling = sampling
        self.lease = lease
        # Leading tokens whose KV is in the cache.
        self.num_computed = num_computed
        # The sampler's running counts; a function of token_ids alone, made when first needed.
        self.penalties: Penalties | None = None

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    def append(self, token: GeneratedToken) -> FinishReason | None:
        """Adds a sampled token; the reason when it is the last one. A stop token is appended like any other."""
        self.token_ids.append(token.token_id)
        if token.token_id in self.sampling.stop_token_ids:
            return FinishReason.STOP
        if self.num_generated >= self.sampling.max_tokens:
            return FinishReason.LENGTH
        return None
