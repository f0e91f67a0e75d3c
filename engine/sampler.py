"""From logits to tokens. A row's token depends on its own logits, tokens and (seed, position), never on its neighbours.

Order: log probabilities of the model's own distribution; then logit bias, repetition, frequency and presence penalty,
min_tokens; then temperature 0 takes the likeliest token (the first of equals), any other temperature draws one after
top_k, top_p and min_p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.penalties import Penalties
from engine.sequence import Sequence
from segue.errors import InternalError
from segue.sampling import GeneratedToken, SamplingParams

# The top-p set is looked for among this many highest weights first: sorting a whole vocabulary takes milliseconds.
_SORT_AT_ONCE = 1024


def sample(logits: torch.Tensor, sequences: Rows[Sequence]) -> list[GeneratedToken]:
    """One token for each row of `logits` [rows, vocab] float32; row i continues sequences[i]. Does not append them."""
    likeliest = logits.numpy().argmax(axis=-1).tolist()
    return [
        GeneratedToken(likeliest[row]) if _is_plain_greedy(sequence.sampling) else _sample_row(logits[row], sequence)
        for row, sequence in enumerate(sequences)
    ]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on (seed, position) alone: the same on every worker and in every attempt."""
    bits = np.random.Philox(key=seed, counter=position).random_raw()
    return (int(bits) >> 11) * 2.0**-53


def _is_plain_greedy(params: SamplingParams) -> bool:
    return params.is_greedy and params.num_logprobs is None and not Penalties.are_needed(params)


def _sample_row(logits: torch.Tensor, sequence: Sequence) -> GeneratedToken:
    """logits: [vocab] float32."""
    params = sequence.sampling
    scores = logits.numpy()
    if Penalties.are_needed(params):
        if sequence.penalties is None:
            sequence.penalties = Penalties(params, sequence.num_prompt_tokens, len(scores))
        scores = scores.copy()
        sequence.penalties.apply(scores, sequence.token_ids)
    if params.is_greedy:
        token_id = int(np.argmax(scores))
    else:
        token_id = _draw(scores, params, uniform(params.seed, len(sequence.token_ids)))
    if params.num_logprobs is None:
        return GeneratedToken(token_id)
    return _with_logprobs(token_id, logits, params.num_logprobs)


def _with_logprobs(token_id: int, logits: torch.Tensor, num_logprobs: int) -> GeneratedToken:
    logprobs = torch.log_softmax(logits, dim=-1)
    top = torch.topk(logprobs, min(num_logprobs, len(logprobs)))
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return GeneratedToken(token_id, float(logprobs[token_id]), pairs)


def _draw(scores: npt.NDArray[np.float32], params: SamplingParams, u: float) -> int:
    """Inverse of the distribution function at `u`, over the tokens that the filters leave, in the order of their ids."""
    highest = float(scores.max())
    if not math.isfinite(highest):
        raise InternalError("the model gave logits that are not finite")
    ids: npt.NDArray[np.intp] | None = None
    if 0 < params.top_k < len(scores):
        ids = _top_k_ids(scores, params.top_k)
        scores = scores[ids]
    # In torch, whose float64 exp and cumsum are several times as fast as NumPy's.
    weights = torch.from_numpy(scores).double().sub_(highest).div_(params.temperature).exp_().numpy()
    if params.top_p < 1.0:
        keep = _top_p_indices(weights, params.top_p)
        weights, ids = weights[keep], keep if ids is None else ids[keep]
    if params.min_p > 0.0:
        keep = np.flatnonzero(weights >= params.min_p * weights.max())
        weights, ids = weights[keep], keep if ids is None else ids[keep]
    cumulative = torch.from_numpy(weights).cumsum(0).numpy()
    # u < 1, but u * total may round up to the total; the last token that can be drawn is then the one meant.
    index = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    index = min(index, int(np.searchsorted(cumulative, cumulative[-1], side="left")))
    return index if ids is None else int(ids[index])


def _top_k_ids(scores: npt.NDArray[np.floating[Any]], k: int) -> npt.NDArray[np.intp]:
    """Ids of the k highest scores, ascending; among equals at the edge the lower ids, so that k = 1 is greedy."""
    edge = np.partition(scores, len(scores) - k)[len(scores) - k]
    above = np.flatnonzero(scores > edge)
    level = np.flatnonzero(scores == edge)[: k - len(above)]
    return np.sort(np.concatenate([above, level]))


def _top_p_indices(weights: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.intp]:
    """Ascending indices of the smallest set of highest weights that holds at least `top_p` of the sum; lower ids first
    among equals."""
    target = top_p * weights.sum()
    candidates = _top_k_ids(weights, _SORT_AT_ONCE) if len(weights) > _SORT_AT_ONCE else np.arange(len(weights))
    if weights[candidates].sum() < target:
        candidates = np.arange(len(weights))
    ordered = candidates[np.argsort(-weights[candidates], kind="stable")]
    num_kept = int(np.searchsorted(np.cumsum(weights[ordered]), target, side="left")) + 1
    return np.sort(ordered[:num_kept])
