"""The weights of one linear layer, in the formats in which a worker may hold them.

Matrices are [outputs, inputs]. A format says how numbers are stored and how a product with activations is defined; how the
product is computed, and in which memory layout, is a backend's business (engine/kernels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

# Inputs that share one scale and one minimum in Int4Weight.
INT4_GROUP = 32
# Largest magnitude of an int8 value: symmetric, so that -128 is not used.
INT8_MAX = 127


@dataclass(frozen=True, slots=True)
class FloatWeight:
    # [outputs, inputs] float32 or bfloat16
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """W8A8: weight = values * scales[:, None]. Activations are scaled per token, dynamically, and rounded to -127 ... 127; the
    products are summed as integers, exactly."""

    # [outputs, inputs] int8, -127 ... 127
    values: torch.Tensor
    # [outputs] float32
    scales: torch.Tensor


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """weight = values * scales + minimums, the latter two for each group of INT4_GROUP consecutive inputs. Activations are
    scaled per token and group, dynamically, and rounded to -127 ... 127; products are summed as integers within a group and as
    float32 from group to group, in the order of the groups."""

    # [outputs, inputs] uint8, 0 ... 15
    values: torch.Tensor
    # [outputs, inputs / INT4_GROUP] float16
    scales: torch.Tensor
    minimums: torch.Tensor


Weight: TypeAlias = FloatWeight | Int8Weight | Int4Weight


@dataclass(frozen=True, slots=True)
class Linear:
    """outputs = weight @ (inputs * input_scales) + bias"""

    weight: Weight
    # [outputs] float32
    bias: torch.Tensor | None = None
    # [inputs] float32: what smoothing took out of the activations and put into the weights.
    input_scales: torch.Tensor | None = None

    @property
    def num_outputs(self) -> int:
        return self.weight.values.shape[0]

    @property
    def num_inputs(self) -> int:
        return self.weight.values.shape[1]
