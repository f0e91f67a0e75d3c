"""Quantized weights are as near to the float ones as their format allows, whatever the weights are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import quantization
from engine.kernels.reference import product
from engine.linear import INT4_GROUP, Int4Weight, Int8Weight, Linear
from engine.quantization import quantize_int4, quantize_int8
from segue.errors import ConfigError

# Rows, columns or groups, a seed, and the order of magnitude of the weights.
shapes = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([1e-3, 0.05, 1.0, 30.0]))


def weights_of(rows: int, columns: int, seed: int, magnitude: float) -> torch.Tensor:
    """Heavy tails now and then, as trained weights have them."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    return magnitude * (normal**3 if seed % 2 else normal)


def dequantized(weight: Int8Weight | Int4Weight) -> torch.Tensor:
    if isinstance(weight, Int8Weight):
        return weight.values * weight.scales[:, None]
    groups = weight.values.unflatten(-1, (-1, INT4_GROUP)) * weight.scales.float()[..., None]
    return (groups + weight.minimums.float()[..., None]).flatten(1)


def group_errors(weights: torch.Tensor, quantized: Int4Weight) -> torch.Tensor:
    """Sum of squared differences in each group, in float64."""
    return (dequantized(quantized).double() - weights.double()).square().unflatten(-1, (-1, INT4_GROUP)).sum(-1)


@settings(deadline=None, derandomize=True)
@given(shapes)
def test_int8_is_within_half_a_step_of_each_weight(shape: tuple[int, int, int, float]) -> None:
    weights = weights_of(*shape)
    quantized, input_scales = quantize_int8(weights)
    assert input_scales is None
    assert (quantized.values.dtype, quantized.scales.dtype) == (torch.int8, torch.float32)
    assert quantized.values.shape == weights.shape
    assert torch.equal(quantized.values.int().abs().amax(-1), torch.full((len(weights),), 127, dtype=torch.int32))
    assert ((dequantized(quantized) - weights).abs() <= quantized.scales[:, None] * 0.5001).all()


@settings(deadline=None, derandomize=True)
@given(shapes)
def test_smoothing_moves_factors_from_the_inputs_to_the_weights(shape: tuple[int, int, int, float]) -> None:
    weights = weights_of(*shape)
    smoothing = torch.rand(weights.shape[1], generator=torch.Generator().manual_seed(shape[2])) * 8 + 0.1
    quantized, input_scales = quantize_int8(weights, smoothing)
    assert input_scales is not None
    torch.testing.assert_close(dequantized(quantized), dequantized(quantize_int8(weights * smoothing)[0]))
    assert ((dequantized(quantized) * input_scales - weights).abs() <= quantized.scales[:, None] * input_scales * 0.5001).all()


def test_smoothing_keeps_small_channels_beside_a_large_one() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs, weights = torch.randn(40, 64, generator=generator), torch.randn(24, 64, generator=generator)
    inputs[:, 5] *= 300
    smoothing = torch.ones(64)
    smoothing[5] = 300**0.5
    exact = inputs @ weights.t()
    errors = []
    for vector in (None, smoothing):
        quantized, input_scales = quantize_int8(weights, vector)
        errors.append(float((product(Linear(quantized), inputs * (1 if input_scales is None else input_scales)) - exact).std()))
    assert errors[1] < errors[0] / 4


def test_rows_of_zeros_stay_zeros() -> None:
    weights = torch.zeros(2, 32)
    assert not dequantized(quantize_int8(weights)[0]).any()
    assert not dequantized(quantize_int4(weights)).any()


def grid(groups: int, seed: int, *, steps: int, lowest: int = 0) -> torch.Tensor:
    """[1, inputs] on grids of float16 scales and minimums, from `lowest` to `lowest` + `steps`, both of which occur."""
    draw = np.random.default_rng(seed)
    scales = draw.uniform(0.001, 0.1, (groups, 1)).astype(np.float16).astype(np.float32)
    minimums = draw.uniform(-1.0, 0.2, (groups, 1)).astype(np.float16).astype(np.float32)
    values = draw.integers(lowest, lowest + steps + 1, (groups, INT4_GROUP))
    values[:, 3], values[:, 20] = lowest, lowest + steps
    return torch.from_numpy(values * scales + minimums).to(torch.float32).reshape(1, -1)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(0, 2**31))
def test_int4_finds_a_grid_of_sixteen_steps_again(groups: int, seed: int) -> None:
    weights = grid(groups, seed, steps=15)
    assert torch.equal(dequantized(quantize_int4(weights)), weights)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(0, 2**31), st.integers(8, 14), st.integers(0, 1))
def test_int4_finds_a_grid_whose_ends_are_not_used(groups: int, seed: int, steps: int, lowest: int) -> None:
    """Up to the rounding of the minimum to float16."""
    weights = grid(groups, seed, steps=steps, lowest=lowest)
    largest = weights.abs().unflatten(-1, (-1, INT4_GROUP)).amax(-1)
    assert (group_errors(weights, quantize_int4(weights)) <= INT4_GROUP * (largest * 2**-11).square() + 1e-9).all()


@settings(deadline=None, derandomize=True)
@given(shapes)
def test_int4_is_never_worse_than_even_steps_between_the_extremes(shape: tuple[int, int, int, float]) -> None:
    rows, groups, seed, magnitude = shape
    weights = weights_of(rows, groups * INT4_GROUP, seed, magnitude)
    quantized = quantize_int4(weights)
    assert quantized.values.dtype == torch.uint8
    assert quantized.scales.dtype == quantized.minimums.dtype == torch.float16
    assert quantized.values.shape == weights.shape
    assert quantized.scales.shape == quantized.minimums.shape == (rows, groups)
    assert int(quantized.values.max()) <= 15
    split = weights.numpy().reshape(rows, groups, INT4_GROUP)
    minimums = split.min(-1, keepdims=True).astype(np.float16).astype(np.float32)
    scales = ((split.max(-1, keepdims=True) - split.min(-1, keepdims=True)) / 15).astype(np.float16).astype(np.float32)
    even = np.clip(np.round((split - minimums) / scales), 0, 15) * scales + minimums
    allowed = torch.from_numpy(np.square(even.astype(np.float64) - split).sum(-1))
    assert (group_errors(weights, quantized) <= allowed * 1.0001).all()


def test_int4_gains_a_tenth_of_the_squared_error_by_fitting() -> None:
    weights = weights_of(64, 1024, seed=4, magnitude=1.0)
    split = weights.unflatten(-1, (-1, INT4_GROUP))
    steps = (split.amax(-1) - split.amin(-1)) / 15
    # What rounding to steps of this width costs on average.
    even = (steps.square() / 12 * INT4_GROUP).sum()
    assert group_errors(weights, quantize_int4(weights)).sum() < 0.92 * even


def test_int4_holds_what_is_constant_in_a_group() -> None:
    weights = torch.tensor([0.5, -0.25, 3.0]).repeat_interleave(INT4_GROUP)[None]
    assert torch.equal(dequantized(quantize_int4(weights)), weights)


def test_results_do_not_depend_on_the_blocks_that_are_worked_on_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.cat([weights_of(7, 96, seed=8, magnitude=1.0), grid(3, 2, steps=15), grid(3, 2, steps=11)])
    whole, whole_int8 = quantize_int4(weights), quantize_int8(weights)[0]
    monkeypatch.setattr(quantization, "_BLOCK_ELEMENTS", 200)
    parts, parts_int8 = quantize_int4(weights), quantize_int8(weights)[0]
    for one, other in ((whole, parts), (whole_int8, parts_int8)):
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.scales, other.scales)
    assert torch.equal(whole.minimums, parts.minimums)


def test_the_source_weights_are_left_alone_and_may_be_bfloat16() -> None:
    weights = weights_of(4, 64, seed=6, magnitude=1.0).to(torch.bfloat16)
    before = weights.clone()
    quantized, _ = quantize_int8(weights, torch.full((64,), 2.0))
    assert torch.equal(weights, before)
    torch.testing.assert_close(dequantized(quantized), 2 * before.float(), atol=0.05, rtol=0)
    torch.testing.assert_close(dequantized(quantize_int4(weights)), before.float(), atol=0.3, rtol=0)


def test_int4_refuses_inputs_that_do_not_fill_groups() -> None:
    with pytest.raises(ConfigError, match="multiple of 32, not 48; use int8"):
        quantize_int4(torch.zeros(2, 48))
