"""Rotary position embeddings, the rotate-half kind, as transformers computes them."""

from __future__ import annotations

import math

import torch

from segue.models.config import LinearScaling, Llama3Scaling, RopeConfig


class RotaryTable:
    """Cosines and sines of positions 0 ... max_context - 1, computed once: the same bits whatever else is in a step."""

    def __init__(self, rope: RopeConfig, head_dim: int, max_context: int) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        # Radians for each position, for each pair of a head's elements. [head_dim / 2]
        frequencies = 1.0 / (rope.theta**exponents)
        if isinstance(rope.scaling, LinearScaling):
            frequencies = frequencies / rope.scaling.factor
        elif isinstance(rope.scaling, Llama3Scaling):
            frequencies = _scale_llama3(frequencies, rope.scaling)
        angles = torch.arange(max_context, dtype=torch.float32)[:, None] * frequencies
        # [max_context, head_dim] float32: head_dim / 2 cosines, then as many sines.
        self.table = torch.cat([angles.cos(), angles.sin()], -1)

    def rows(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and signed sines [tokens, 1, head_dim] float32 of positions [tokens], as `rotate` wants them."""
        cos, sin = self.table[positions].chunk(2, dim=-1)
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def rotate(heads: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> None:
    """Rotates `heads` [tokens, heads, head_dim] in place."""
    swapped = torch.roll(heads, heads.shape[-1] // 2, -1)
    heads.mul_(cos).add_(swapped.mul_(signed_sin))


def _scale_llama3(frequencies: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    """Wavelengths longer than the original context are stretched by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    longest_kept = scaling.original_max_position / scaling.high_freq_factor
    shortest_stretched = scaling.original_max_position / scaling.low_freq_factor
    share_kept = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    stretched = frequencies / scaling.factor
    blended = (1 - share_kept) * stretched + share_kept * frequencies
    long_or_blended = torch.where(wavelengths > shortest_stretched, stretched, blended)
    return torch.where(wavelengths < longest_kept, frequencies, long_or_blended)
