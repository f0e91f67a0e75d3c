"""The GPU backend: Triton kernels (triton_kernels.py, triton_attention.py), launched.

Not run on hardware. Tests run it on the CPU with Triton's interpreter, which TRITON_INTERPRET=1 switches on when Triton is
first imported, and compile its kernels for NVIDIA GPUs.

A row's result does not depend on the other rows of its step: products use one shape of tile, whatever the number of rows
(cuBLAS would choose by it), and attention adds up positions in order, without splitting a context between programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton import next_power_of_2

from engine.kernels import triton_attention, triton_kernels
from engine.kernels.triton_step import TritonStep, padded_step, prepare
from engine.kv_cache import TORCH_DTYPES, KVCache
from engine.linear import INT4_GROUP, FloatWeight, Int4Weight, Int8Weight, Linear
from engine.rotary import RotaryTable
from engine.step import StepInputs
from segue.errors import InternalError
from segue.models.config import ModelConfig

# Rows, outputs and inputs that one program of a product holds at a time.
_TILE = {"tile_rows": 32, "tile_outputs": 64, "tile_inputs": 64}
_INT4_TILE = {"tile_rows": 32, "tile_outputs": 64, "group_size": INT4_GROUP}
# Rows and, at most, inputs of each that one program normalises and quantizes at a time.
_ENTER_ROWS = 1
_MAX_ROW_WIDTH = 2048
# Rows that one program rotates and writes.
_ROTATE_ROWS = 16
# Rows (tokens times heads of a group) of a program of attention: at least as many as a matrix instruction takes when decoding.
_DECODE_ROWS, _PREFILL_ROWS = 16, 32
# Positions that attention reads at a time, and how many such spans are on their way. With heads of 128 float32 elements this
# takes 72 KiB of shared memory, of the 99 that the smallest GPUs since Ampere have.
_SPAN, _SPAN_STAGES = 32, 2


@dataclass(frozen=True, slots=True)
class PackedInt4:
    """Int4Weight with two values in a byte; a last group without a partner is paired with zeros."""

    # [outputs, pairs * INT4_GROUP] uint8: of each pair of groups the first in the low four bits
    values: torch.Tensor
    # [pairs * 2, outputs] float16
    scales: torch.Tensor
    minimums: torch.Tensor

    @property
    def num_groups(self) -> int:
        """The added one included."""
        return len(self.scales)


@dataclass(frozen=True, slots=True)
class TritonLinear:
    """A linear layer on the device."""

    weight: FloatWeight | Int8Weight | PackedInt4
    num_inputs: int
    num_outputs: int
    # [outputs] float32
    bias: torch.Tensor | None
    # The norm's weight times the layer's input_scales. [inputs] float32
    factors: torch.Tensor | None
    normed: bool
    gated: bool


class TritonKernels:
    def __init__(self, config: ModelConfig, cache: KVCache, rotary: RotaryTable) -> None:
        """Computes on the device of the cache."""
        self.device = cache.layers[0].device
        self.cache = cache
        self.name = "triton (cuda)" if self.device.type == "cuda" else "triton (interpreter)"
        self._config = config
        self._rotary = rotary.table.to(self.device)
        self._cells = [layer.view(TORCH_DTYPES[cache.layout.dtype]) for layer in cache.layers]
        has_scales = cache.layout.dtype == "int8"
        self._scales = [layer.view(torch.float32) if has_scales else None for layer in cache.layers]
        self._shape: dict[str, Any] = {
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "block_size": cache.layout.block_size,
        }
        # Heads that share a kv head, rounded up, and the tokens of a tile with which they fill a program of a prefill.
        self._group_width = next_power_of_2(config.num_heads // config.num_kv_heads)
        self._prefill_tokens = max(1, _PREFILL_ROWS // self._group_width)

    def pack(self, linear: Linear, *, norm: torch.Tensor | None = None, gated: bool = False) -> TritonLinear:
        if gated and norm is not None:
            raise InternalError("a layer has either a norm or gated inputs")
        factors = linear.input_scales if norm is None else norm if linear.input_scales is None else norm * linear.input_scales
        return TritonLinear(
            weight=self._pack_weight(linear),
            num_inputs=linear.num_inputs,
            num_outputs=linear.num_outputs,
            bias=None if linear.bias is None else linear.bias.to(self.device),
            factors=None if factors is None else factors.to(self.device),
            normed=norm is not None,
            gated=gated,
        )

    def prepare(self, step: StepInputs) -> TritonStep:
        return prepare(step, self.cache.layout, self._prefill_tokens, self.device)

    def padded_step(self, num_rows: int) -> TritonStep:
        """A step of padding, for steps of up to `num_rows` chunks of one token to be written into (engine/cuda_graphs.py)."""
        return padded_step(num_rows, self.cache.layout.num_blocks_for(len(self._rotary)), self.device)

    def refill(self, padded: TritonStep, step: StepInputs) -> None:
        padded.refill(self.prepare(step))

    def linear(self, layer: TritonLinear, inputs: torch.Tensor, *, add_to: torch.Tensor | None = None) -> torch.Tensor:
        num_tokens = len(inputs)
        outputs = self._empty(num_tokens, layer.num_outputs) if add_to is None else add_to
        grid = (-(-num_tokens // _TILE["tile_rows"]), -(-layer.num_outputs // _TILE["tile_outputs"]))
        rest = (layer.bias, outputs, num_tokens, layer.num_outputs)
        add = add_to is not None
        match layer.weight:
            case FloatWeight(values):
                entered = inputs
                if layer.factors is not None or layer.gated:
                    entered = self._empty(num_tokens, layer.num_inputs)
                    self._enter(triton_kernels.enter_float, layer, inputs, entered)
                triton_kernels.float_product[grid](entered, values, *rest, layer.num_inputs, add=add, **_TILE)
            case Int8Weight(values, scales):
                entered, input_scales = self._empty_int8(num_tokens, layer.num_inputs), self._empty(num_tokens)
                self._enter(triton_kernels.enter_int8, layer, inputs, entered, input_scales)
                triton_kernels.int8_product[grid](
                    entered, input_scales, values, scales, *rest, layer.num_inputs, add=add, **_TILE
                )
            case PackedInt4(values, scales, minimums):
                num_groups = layer.weight.num_groups
                entered = self._empty_int8(num_tokens, num_groups * INT4_GROUP)
                input_scales = self._empty(num_tokens, num_groups)
                groups = {"num_groups": num_groups, "group_size": INT4_GROUP}
                self._enter(triton_kernels.enter_int4, layer, inputs, entered, input_scales, **groups)
                triton_kernels.int4_product[grid](
                    entered, input_scales, values, scales, minimums, *rest, num_groups // 2, add=add, **_INT4_TILE
                )
        return outputs

    def rotate_and_write(self, layer: int, heads: torch.Tensor, qk_norm: torch.Tensor | None, step: TritonStep) -> None:
        """`qk_norm` lies on the device."""
        num_heads = self._config.num_heads + 2 * self._config.num_kv_heads
        triton_attention.rotate_and_write[-(-len(heads) // _ROTATE_ROWS), num_heads](
            heads,
            qk_norm,
            self._rotary,
            step.num_tokens,
            step.positions,
            step.pieces,
            step.block_table,
            self._cells[layer],
            self._scales[layer],
            step.block_table.shape[1],
            self._config.rms_norm_eps,
            **self._shape,
            tile_rows=_ROTATE_ROWS,
            half_width=next_power_of_2(self._config.head_dim // 2),
            # As in _enter.
            enable_fp_fusion=False,
        )

    def attend(self, layer: int, heads: torch.Tensor, step: TritonStep) -> torch.Tensor:
        outputs = self._empty(len(heads), self._config.num_heads * self._config.head_dim)
        decode_width = max(self._group_width, _DECODE_ROWS)
        self._attend(layer, heads, step, outputs, step.decode_tiles, tile_tokens=1, group_width=decode_width)
        shape = {"tile_tokens": self._prefill_tokens, "group_width": self._group_width}
        self._attend(layer, heads, step, outputs, step.prefill_tiles, **shape)
        return outputs

    def _attend(
        self,
        layer: int,
        heads: torch.Tensor,
        step: TritonStep,
        outputs: torch.Tensor,
        tiles: torch.Tensor,
        *,
        tile_tokens: int,
        group_width: int,
    ) -> None:
        if not len(tiles):
            return
        triton_attention.attend[len(tiles), self._config.num_kv_heads](
            heads,
            step.positions,
            tiles,
            step.block_table,
            self._cells[layer],
            self._scales[layer],
            outputs,
            step.block_table.shape[1],
            self._config.head_dim**-0.5,
            **self._shape,
            tile_tokens=tile_tokens,
            group_width=group_width,
            head_width=max(16, next_power_of_2(self._config.head_dim)),
            span=_SPAN,
            num_stages=_SPAN_STAGES,
            # Keys and values of fewer bits are exact in TensorFloat-32, which tensor cores multiply; queries lose some bits.
            # Three such products make up one of float32.
            precision="tf32x3" if self.cache.layout.dtype == "float32" else "tf32",
        )

    def _pack_weight(self, linear: Linear) -> FloatWeight | Int8Weight | PackedInt4:
        match linear.weight:
            case FloatWeight(values):
                return FloatWeight(values.contiguous().to(self.device))
            case Int8Weight(values, scales):
                return Int8Weight(values.contiguous().to(self.device), scales.to(self.device))
            case Int4Weight():
                return pack_int4(linear.weight, self.device)

    def _enter(self, kernel: Any, layer: TritonLinear, inputs: torch.Tensor, *results: torch.Tensor, **options: int) -> None:
        """Applies to inputs what comes before a product."""
        kernel[-(-len(inputs) // _ENTER_ROWS),](
            inputs,
            layer.factors,
            *results,
            len(inputs),
            layer.num_inputs,
            eps=self._config.rms_norm_eps,
            normed=layer.normed,
            gated=layer.gated,
            tile_rows=_ENTER_ROWS,
            width=min(next_power_of_2(max(layer.num_inputs, INT4_GROUP)), _MAX_ROW_WIDTH),
            # Quantization rounds a product, then a sum: fused, they would round once.
            enable_fp_fusion=False,
            **options,
        )

    def _empty_int8(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int8, device=self.device)

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)


def pack_int4(weight: Int4Weight, device: torch.device) -> PackedInt4:
    num_groups = weight.scales.shape[1]
    num_missing = num_groups % 2
    values = torch.nn.functional.pad(weight.values, (0, num_missing * INT4_GROUP)).view(len(weight.values), -1, 2, INT4_GROUP)
    scales, minimums = (
        torch.nn.functional.pad(part, (0, num_missing)).t().contiguous().to(device) for part in (weight.scales, weight.minimums)
    )
    packed = values[:, :, 0] | values[:, :, 1] << 4
    return PackedInt4(packed.flatten(1).contiguous().to(device), scales, minimums)
