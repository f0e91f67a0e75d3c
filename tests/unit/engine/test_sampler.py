"""Sampling: what is likely, what is filtered, and that noise is a function of seed and position alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.sampler import sample, uniform
from engine.sequence import Sequence
from segue.errors import InternalError
from segue.sampling import FinishReason, GeneratedToken, SamplingParams

VOCAB = 50


def make_sequence(token_ids: list[int] | None = None, num_prompt_tokens: int | None = None, **options: Any) -> Sequence:
    params = SamplingParams(max_tokens=100, **options)
    return Sequence("s", token_ids or [1, 2, 3], params, num_prompt_tokens=num_prompt_tokens)


def make_logits(seed: int = 0, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def draws(logits: torch.Tensor, count: int, **options: Any) -> list[int]:
    return [sample(logits, [make_sequence(seed=seed, **options)])[0].token_id for seed in range(count)]


def test_noise_is_a_fixed_function_of_seed_and_position():
    # Fixed for ever: workers of different builds must agree, and a replay of old requests too.
    assert uniform(0, 0) == 0.011546754286331562
    assert uniform(7, 3) == uniform(7, 3)
    values = {uniform(seed, position) for seed in (0, 1, 2**64 - 1) for position in range(200)}
    assert len(values) == 600
    assert all(0 <= value < 1 for value in values)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1), neighbours=st.integers(0, 3), filters=st.sampled_from([{}, {"top_k": 9}, {"top_p": 0.8}])
)
def test_a_row_does_not_depend_on_its_neighbours(seed, neighbours, filters):
    logits = make_logits(rows=neighbours + 1)
    alone = sample(logits[-1:], [make_sequence(seed=seed, **filters)])
    others = [make_sequence(seed=index, repetition_penalty=1.3) for index in range(neighbours)]
    assert sample(logits, [*others, make_sequence(seed=seed, **filters)])[-1:] == alone


def test_position_and_seed_change_the_draw():
    logits = torch.zeros(1, VOCAB)
    by_position = {sample(logits, [make_sequence([0] * n, seed=5)])[0].token_id for n in range(1, 30)}
    assert len(by_position) > 10
    assert len(set(draws(logits, 30))) > 10


@settings(max_examples=50, deadline=None)
@given(scores=st.lists(st.sampled_from([0.0, 1.0, 2.5, -1.0]), min_size=2, max_size=30), seed=st.integers(0, 999))
def test_top_k_of_one_is_greedy_also_among_equals(scores, seed):
    logits = torch.tensor([scores])
    expected = scores.index(max(scores))
    assert sample(logits, [make_sequence(temperature=0.0)])[0].token_id == expected
    assert sample(logits, [make_sequence(top_k=1, seed=seed)])[0].token_id == expected
    assert sample(logits, [make_sequence(top_p=1e-9, seed=seed)])[0].token_id == expected
    assert sample(logits, [make_sequence(min_p=1.0, top_k=1, seed=seed)])[0].token_id == expected


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
            [TemperatureLogitsWarper(1.5), TopKLogitsWarper(20), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ],
)
def test_draws_follow_the_distribution_that_transformers_filters(options, warpers):
    logits = make_logits(4)
    expected = torch.softmax(LogitsProcessorList(warpers)(torch.tensor([[0]]), logits.clone())[0], -1).numpy()
    count = 1500
    observed = np.bincount(draws(logits, count, **options), minlength=VOCAB)
    assert observed[expected == 0].sum() == 0
    # Five standard deviations of each token's count.
    assert (np.abs(observed - count * expected) <= 5 * np.sqrt(count * expected * (1 - expected)) + 1).all()


def test_top_p_is_exact_where_more_tokens_are_needed_than_are_looked_at_first():
    vocab = 4000
    flat = torch.zeros(1, vocab)
    tokens = draws(flat, 300, top_p=0.5)
    assert max(tokens) < vocab // 2
    assert max(tokens) > 1024


def test_a_temperature_near_zero_is_greedy():
    logits = make_logits(9)
    assert set(draws(logits, 20, temperature=1e-300)) == {int(logits.argmax())}


def test_repetition_penalty_is_that_of_transformers():
    prompt, generated = [3, 8, 8, 11], [5, 3, 20]
    logits = make_logits(2)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + generated]), logits.clone())
    sequence = make_sequence(prompt + generated, 4, repetition_penalty=1.7, temperature=0.0)
    logits[0, 20] = expected[0, 20] = 30.0
    assert sample(logits, [sequence])[0].token_id == int(expected.argmax())
    assert sequence.penalties is not None
    scores = logits[0].numpy().copy()
    sequence.penalties.apply(scores, sequence.token_ids)
    expected[0, 20] = 30.0 / 1.7
    np.testing.assert_allclose(scores, expected[0].numpy(), rtol=1e-6)


def test_presence_and_frequency_count_generated_tokens_only():
    prompt, generated = [4, 4, 9], [7, 7, 7, 2]
    sequence = make_sequence(prompt + generated, 3, presence_penalty=0.5, frequency_penalty=0.25, temperature=0.0)
    sample(torch.zeros(1, VOCAB), [sequence])
    scores = np.zeros(VOCAB, np.float32)
    assert sequence.penalties is not None
    sequence.penalties.apply(scores, sequence.token_ids)
    expected = np.zeros(VOCAB, np.float32)
    expected[7], expected[2] = -0.5 - 3 * 0.25, -0.5 - 0.25
    np.testing.assert_allclose(scores, expected)


def test_a_sequence_rebuilt_from_its_tokens_goes_on_the_same():
    """As after a failover, or when decode takes over from prefill."""
    options = {"seed": 11, "repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.3, "top_p": 0.95}
    sequence = make_sequence([1, 2, 3], **options)
    for step in range(30):
        logits = make_logits(step)
        rebuilt = make_sequence(list(sequence.token_ids), 3, **options)
        (token,) = sample(logits, [sequence])
        assert sample(logits, [rebuilt]) == [token]
        sequence.append(token)


def test_logit_bias_and_min_tokens():
    logits = make_logits(1)
    best, second = logits[0].topk(2).indices.tolist()
    assert sample(logits, [make_sequence(temperature=0.0, logit_bias={second: 100.0, 10**6: 5.0})])[0].token_id == second
    waiting = make_sequence(temperature=0.0, min_tokens=2, stop_token_ids=(best, 10**6))
    assert sample(logits, [waiting])[0].token_id == second
    waiting.token_ids += [second, second]
    assert sample(logits, [waiting])[0].token_id == best


def test_logprobs_are_of_the_models_own_distribution():
    logits = make_logits(6)
    expected = torch.log_softmax(logits[0], -1)
    worst = int(logits.argmin())
    options = {"temperature": 0.0, "logit_bias": {worst: 100.0}}
    (token,) = sample(logits, [make_sequence(num_logprobs=3, **options)])
    assert token.token_id == worst
    assert token.logprob == pytest.approx(float(expected[worst]))
    assert [token_id for token_id, _ in token.top_logprobs] == expected.topk(3).indices.tolist()
    assert sum(math.exp(logprob) for _, logprob in token.top_logprobs) < 1
    (alone,) = sample(logits, [make_sequence(num_logprobs=0, **options)])
    assert alone == GeneratedToken(worst, token.logprob, ())
    assert sample(logits, [make_sequence(**options)]) == [GeneratedToken(worst)]


def test_logits_that_are_not_finite_are_a_defect():
    with pytest.raises(InternalError, match="not finite"):
        sample(torch.full((1, VOCAB), math.nan), [make_sequence()])


def test_append_tells_why_a_sequence_ends():
    sequence = Sequence("s", [1, 2, 3, 4], SamplingParams(max_tokens=3, stop_token_ids=(9,)), num_prompt_tokens=3)
    assert (sequence.num_generated, sequence.num_uncomputed) == (1, 4)
    assert sequence.append(GeneratedToken(5)) is None
    assert sequence.append(GeneratedToken(6)) is FinishReason.LENGTH
    sequence = Sequence("s", [1], SamplingParams(max_tokens=1, stop_token_ids=(9,)))
    assert sequence.append(GeneratedToken(9)) is FinishReason.STOP
