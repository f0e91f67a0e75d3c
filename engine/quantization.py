"""From float weights to the integer formats of engine/linear.py. Pure functions, fast enough to run whenever a worker loads.

int8  One scale for each output. Activations are rounded as well, and a few of their channels are far larger than the rest,
      which would leave few steps for the others; *smoothing* divides each input channel by a factor and multiplies the
      weight's column by it (SmoothQuant, Xiao et al. 2023, arXiv:2211.10438). engine/calibration.py chooses the factors.
int4  A scale and a minimum for each group of 32 inputs, the layout of llama.cpp's Q4_1. Weights that lie on such a grid, as
      those of an imported Q4_1 file do, are found on it again; others get a grid near that of least squares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.linear import INT4_GROUP, INT8_MAX, Int4Weight, Int8Weight
from segue.errors import ConfigError

_INT4_MAX = 15
# Elements worked on at a time: few enough for a cache, many enough that the calls cost little.
_BLOCK_ELEMENTS = 2**19
# Rounds of fitting a grid to its values and rounding to it again; a third round gains less than 2 % of the squared error.
_INT4_ROUNDS = 2
# Grids with fewer steps than _INT4_MAX between a group's extremes that are looked for, and how near to whole steps the first
# few of its weights must be for a closer look.
_FEWER_STEPS = range(3, _INT4_MAX)
_ON_GRID = 0.01
_ROWS_LOOKED_AT = 4


def quantize_int8(weight: torch.Tensor, smoothing: torch.Tensor | None = None) -> tuple[Int8Weight, torch.Tensor | None]:
    """`weight` [outputs, inputs] of any float dtype, times `smoothing` [inputs] float32, positive, where given.

    Returns the quantized product, nearest values, halves to even; and `Linear.input_scales`: 1 / smoothing, or None.
    """
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight))
    num_rows = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    for first in range(0, len(weight), num_rows):
        rows = slice(first, first + num_rows)
        block = weight[rows].to(torch.float32, copy=True)
        if smoothing is not None:
            block *= smoothing
        largest = block.abs().amax(-1)
        inverse = torch.where(largest > 0, INT8_MAX / largest, 0.0)
        values[rows] = block.mul_(inverse[:, None]).round_()
        scales[rows] = largest / INT8_MAX
    return Int8Weight(values, scales), None if smoothing is None else smoothing.reciprocal()


def quantize_int4(weight: torch.Tensor) -> Int4Weight:
    """`weight` [outputs, inputs] of any float dtype. Raises ConfigError when the inputs do not fill groups of INT4_GROUP."""
    num_outputs, num_inputs = weight.shape
    if num_inputs % INT4_GROUP:
        raise ConfigError(
            f"weights: int4 needs layers whose inputs are a multiple of {INT4_GROUP}, not {num_inputs}; use int8 for this model"
        )
    num_groups = num_inputs // INT4_GROUP
    values = torch.empty(num_outputs, num_groups, INT4_GROUP, dtype=torch.uint8)
    scales = torch.empty(num_outputs, num_groups, dtype=torch.float16)
    minimums = torch.empty_like(scales)
    num_rows = max(1, _BLOCK_ELEMENTS // num_inputs)
    for first in range(0, num_outputs, num_rows):
        rows = slice(first, first + num_rows)
        # A group's weights lie in a column: sums and extremes then run over whole rows, which is several times as fast.
        grid = _best_grids(weight[rows].to(torch.float32).reshape(-1, INT4_GROUP).t().contiguous())
        values[rows] = grid.values.t().reshape(-1, num_groups, INT4_GROUP)
        scales[rows] = grid.scales.view(-1, num_groups)
        minimums[rows] = grid.minimums.view(-1, num_groups)
    return Int4Weight(values.view(num_outputs, num_inputs), scales, minimums)


@dataclass(frozen=True, slots=True)
class _Grids:
    """Columns of weights [INT4_GROUP, groups] as values * scales + minimums, all float32; the latter two fit in float16."""

    # [INT4_GROUP, groups], whole numbers 0 ... 15
    values: torch.Tensor
    # [groups]
    scales: torch.Tensor
    minimums: torch.Tensor

    def improve(
        self, groups: slice | torch.Tensor, errors: torch.Tensor, others: _Grids, other_errors: torch.Tensor
    ) -> torch.Tensor:
        """Takes over those of `others`, which are for these `groups`, with a smaller error. Returns the errors that remain."""
        better = other_errors < errors
        self.values[:, groups] = torch.where(better, others.values, self.values[:, groups])
        self.scales[groups] = torch.where(better, others.scales, self.scales[groups])
        self.minimums[groups] = torch.where(better, others.minimums, self.minimums[groups])
        return torch.minimum(errors, other_errors)


def _best_grids(weights: torch.Tensor) -> _Grids:
    """weights: [INT4_GROUP, groups] float32."""
    lowest = weights.amin(0)
    spread = weights.amax(0) - lowest
    grids = _nearest(weights, spread / _INT4_MAX, lowest)
    errors = _squared_errors(weights, grids)
    if not errors.any():
        return grids
    fitted = grids
    for _ in range(_INT4_ROUNDS):
        fitted = _nearest(weights, *_least_squares(weights, fitted.values))
    errors = grids.improve(slice(None), errors, fitted, _squared_errors(weights, fitted))
    # Imported weights whose group does not use both ends of its grid: fewer steps between the extremes, but whole ones.
    shares = (weights[:_ROWS_LOOKED_AT] - lowest) / spread
    for num_steps in _FEWER_STEPS:
        steps = shares * num_steps
        groups = (steps.sub_(steps.round()).abs_().amax(0) < _ON_GRID).nonzero()[:, 0]
        if len(groups):
            found = _nearest(weights[:, groups], spread[groups] / num_steps, lowest[groups])
            errors[groups] = grids.improve(groups, errors[groups], found, _squared_errors(weights[:, groups], found))
    return grids


def _nearest(weights: torch.Tensor, scales: torch.Tensor, minimums: torch.Tensor) -> _Grids:
    """Grids of these scales and minimums [groups], rounded to float16, and on them the points nearest to the weights."""
    scales, minimums = (values.to(torch.float16).to(torch.float32) for values in (scales, minimums))
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    return _Grids((weights - minimums).mul_(inverse).round_().clamp_(0, _INT4_MAX), scales, minimums)


def _squared_errors(weights: torch.Tensor, grids: _Grids) -> torch.Tensor:
    """[groups]"""
    return (grids.values * grids.scales).add_(grids.minimums).sub_(weights).square_().sum(0)


def _least_squares(weights: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minimums [groups] with which `values` [INT4_GROUP, groups] come nearest to the weights."""
    mean_value, mean_weight = values.mean(0), weights.mean(0)
    centred = values - mean_value
    variance = centred.square().sum(0)
    scales = torch.where(variance > 0, (centred * weights).sum(0) / variance, 0.0)
    return scales, mean_weight - scales * mean_value
