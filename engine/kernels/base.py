"""The operations that a forward pass is made of: the interface that each backend implements.

    prepare → for each layer: linear, rotate_and_write, attend, linear, linear, linear → linear (the output head)

Activations are float32 and contiguous on every backend: [tokens, features]. What differs between backends is how weights lie
in memory (`pack`, once at load) and what a step needs beforehand (`prepare`, once for a step); both results are opaque to
everybody else. A backend may reuse the memory of its results: a tensor that an operation returned is valid until the next
result of the same shape is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

from engine.kv_cache import KVCache
from engine.linear import Linear
from engine.step import StepInputs

PackedT = TypeVar("PackedT")
StepT = TypeVar("StepT")


@dataclass(frozen=True, slots=True)
class DecoderLayer(Generic[PackedT]):
    """A layer's linear layers as the backend packed them."""

    qkv: PackedT
    attention_output: PackedT
    gate_up: PackedT
    down: PackedT
    # [num_heads + num_kv_heads, head_dim] float32, if the model has it.
    qk_norm: torch.Tensor | None


class Kernels(Protocol[PackedT, StepT]):
    # For messages and reports: "torch", "native (avx2)", "triton (cuda)".
    name: str
    device: torch.device
    cache: KVCache

    def pack(self, linear: Linear, *, norm: torch.Tensor | None = None, gated: bool = False) -> PackedT:
        """A linear layer with what is applied to its inputs first, in the backend's own memory layout.

        With `norm` [inputs] float32, inputs are scaled to a root mean square of 1 and multiplied by it. With `gated`, inputs
        come as [tokens, 2 * inputs]: a gate and a value, of which silu(gate) * value enters the layer.
        """

    def prepare(self, step: StepInputs) -> StepT:
        """What the other operations need to know of a step."""

    def linear(self, layer: PackedT, inputs: torch.Tensor, *, add_to: torch.Tensor | None = None) -> torch.Tensor:
        """[tokens, outputs]; with `add_to`, of that shape, the result is added to it in place and it is returned."""

    def rotate_and_write(self, layer: int, heads: torch.Tensor, qk_norm: torch.Tensor | None, step: StepT) -> None:
        """Normalises (if `qk_norm` [num_heads + num_kv_heads, head_dim] is given) and rotates the query and key heads of
        `heads` [tokens, (num_heads + 2 * num_kv_heads) * head_dim] in place; writes K and V into the layer's cache."""

    def attend(self, layer: int, heads: torch.Tensor, step: StepT) -> torch.Tensor:
        """Each token's query attends to its context in the cache, itself included: [tokens, num_heads * head_dim]."""


@runtime_checkable
class LayerKernels(Protocol):
    """What a backend offers beside `Kernels` where a call for each operation costs time that a short step notices."""

    def join_layers(self, layers: tuple[DecoderLayer[Any], ...]) -> Any:
        """All layers of a decoder, at least one, for `run_layers`."""

    def run_layers(self, layers: Any, hidden: torch.Tensor, step: Any) -> None:
        """All operations of all layers in one call: `hidden` [tokens, hidden size] float32 as the last layer leaves it."""
