"""The plain torch backend: what each operation means. It serves where the native one cannot be built; tests compare with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from engine.kv_cache import KVCache
from engine.linear import INT4_GROUP, INT8_MAX, FloatWeight, Int4Weight, Int8Weight, Linear
from engine.rotary import RotaryTable, rotate
from engine.step import Piece, StepInputs
from segue.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class TorchLinear:
    linear: Linear
    norm: torch.Tensor | None
    gated: bool


@dataclass(frozen=True, slots=True)
class TorchStep:
    # Block and offset in it of each token. [tokens] int64
    blocks: torch.Tensor
    offsets: torch.Tensor
    # [tokens, 1, head_dim] float32, as `rotate` wants them
    cos: torch.Tensor
    signed_sin: torch.Tensor
    pieces: list[Piece]
    # Blocks of each piece's context. [blocks] int64
    contexts: list[torch.Tensor]


class TorchKernels:
    """Gathers each context into contiguous memory, then uses torch's fused attention."""

    name = "torch"

    def __init__(self, config: ModelConfig, cache: KVCache, rotary: RotaryTable) -> None:
        self.device = cache.layers[0].device
        self._config = config
        self.cache = cache
        self._rotary = rotary

    def pack(self, linear: Linear, *, norm: torch.Tensor | None = None, gated: bool = False) -> TorchLinear:
        return TorchLinear(linear, norm, gated)

    def prepare(self, step: StepInputs) -> TorchStep:
        block_size = self.cache.layout.block_size
        contexts = [torch.tensor(piece.lease.block_ids[: -(-piece.end // block_size)]) for piece in step.pieces]
        blocks = torch.cat(
            [
                context[torch.arange(piece.start, piece.end) // block_size]
                for piece, context in zip(step.pieces, contexts, strict=True)
            ]
        )
        cos, signed_sin = self._rotary.rows(step.positions)
        return TorchStep(
            blocks=blocks.to(torch.int64),
            offsets=step.positions % block_size,
            cos=cos,
            signed_sin=signed_sin,
            pieces=step.pieces,
            contexts=[context.to(torch.int64) for context in contexts],
        )

    def linear(self, layer: TorchLinear, inputs: torch.Tensor, *, add_to: torch.Tensor | None = None) -> torch.Tensor:
        entering = self.entering(layer, inputs)
        if layer.linear.input_scales is not None:
            entering = entering * layer.linear.input_scales
        outputs = product(layer.linear, entering)
        if layer.linear.bias is not None:
            outputs += layer.linear.bias
        return outputs if add_to is None else add_to.add_(outputs)

    def entering(self, layer: TorchLinear, inputs: torch.Tensor) -> torch.Tensor:
        """What is left of a layer's inputs after norm or gate: [tokens, inputs]."""
        if layer.norm is not None:
            return rms_norm(inputs, layer.norm, self._config.rms_norm_eps)
        if layer.gated:
            gate, value = inputs.chunk(2, dim=-1)
            return silu(gate).mul_(value)
        return inputs

    def rotate_and_write(self, layer: int, heads: torch.Tensor, qk_norm: torch.Tensor | None, step: TorchStep) -> None:
        config = self._config
        split = heads.view(len(heads), -1, config.head_dim)
        rotated = split[:, : config.num_heads + config.num_kv_heads]
        if qk_norm is not None:
            rotated.copy_(rms_norm(rotated, qk_norm, config.rms_norm_eps))
        rotate(rotated, step.cos, step.signed_sin)
        keys, values = split[:, config.num_heads :].chunk(2, dim=1)
        if self.cache.layout.dtype == "int8":
            scales = self.cache.scales(layer)
            keys, scales[step.blocks, 0, :, step.offsets] = quantize_rows(keys)
            values, scales[step.blocks, 1, :, step.offsets] = quantize_rows(values)
        cached_keys, cached_values = self.cache.keys(layer), self.cache.values(layer)
        cached_keys[step.blocks, :, :, step.offsets] = keys.to(cached_keys.dtype)
        cached_values[step.blocks, :, step.offsets] = values.to(cached_values.dtype)

    def attend(self, layer: int, heads: torch.Tensor, step: TorchStep) -> torch.Tensor:
        queries = heads.view(len(heads), -1, self._config.head_dim)[:, : self._config.num_heads]
        parts = [
            self._attend(layer, queries[piece.first_row : piece.first_row + piece.num_rows], piece, blocks)
            for piece, blocks in zip(step.pieces, step.contexts, strict=True)
        ]
        return torch.cat(parts)

    def _attend(self, layer: int, queries: torch.Tensor, piece: Piece, blocks: torch.Tensor) -> torch.Tensor:
        """queries [rows, num_heads, head_dim] → [rows, num_heads * head_dim]"""
        keys = self.cache.keys(layer)[blocks].to(torch.float32)
        values = self.cache.values(layer)[blocks].to(torch.float32)
        if self.cache.layout.dtype == "int8":
            scales = self.cache.scales(layer)[blocks]
            keys, values = keys * scales[:, 0, :, None], values * scales[:, 1, :, :, None]
        # [num_kv_heads, positions, head_dim]
        keys = keys.permute(1, 0, 3, 2).flatten(1, 2)[:, : piece.end]
        values = values.permute(1, 0, 2, 3).flatten(1, 2)[:, : piece.end]
        may_look = torch.ones(piece.num_rows, piece.end, dtype=torch.bool).tril_(piece.start)
        if self.cache.layout.dtype == "bfloat16":
            return attention_in_bfloat16(queries, keys, values, may_look)
        outputs = scaled_dot_product_attention(
            queries.transpose(0, 1)[None], keys[None], values[None], attn_mask=may_look, enable_gqa=True
        )
        return outputs[0].transpose(0, 1).flatten(1)


def attention_in_bfloat16(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, may_look: torch.Tensor
) -> torch.Tensor:
    """Queries and weights are rounded to bfloat16 as keys and values were; sums are float32.

    queries [rows, num_heads, head_dim], keys and values [num_kv_heads, positions, head_dim] float32, may_look [rows, positions]
    bool → [rows, num_heads * head_dim]
    """
    grouped = _rounded(queries * (math.log2(math.e) / math.sqrt(queries.shape[-1]))).view(
        len(queries), len(keys), -1, queries.shape[-1]
    )
    scores = torch.einsum("rkgd,kpd->kgrp", grouped, keys).masked_fill_(~may_look, -torch.inf)
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
    sums = weights.sum(-1, keepdim=True)
    outputs = torch.einsum("kgrp,kpd->kgrd", _rounded(weights), values) / sums
    return outputs.permute(2, 0, 1, 3).flatten(1)


def _rounded(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16).to(torch.float32)


def product(layer: Linear, inputs: torch.Tensor) -> torch.Tensor:
    """inputs [tokens, inputs] float32 times the layer's weight, as its format defines it: [tokens, outputs] float32."""
    match layer.weight:
        case FloatWeight(values):
            return linear(inputs.to(values.dtype), values).to(torch.float32)
        case Int8Weight(values, scales):
            quantized, row_scales = quantize_rows(inputs)
            return integer_product(quantized, values).mul_(row_scales[:, None]).mul_(scales)
        case Int4Weight():
            return _int4_product(layer.weight, inputs)


def _int4_product(weight: Int4Weight, inputs: torch.Tensor) -> torch.Tensor:
    quantized, row_scales = quantize_rows(inputs.view(len(inputs), inputs.shape[1] // INT4_GROUP, INT4_GROUP))
    outputs = torch.zeros(len(inputs), len(weight.values))
    for group in range(row_scales.shape[1]):
        columns = slice(group * INT4_GROUP, (group + 1) * INT4_GROUP)
        sums = integer_product(quantized[:, group], weight.values[:, columns].to(torch.int8))
        outputs += sums.mul_(row_scales[:, group, None]) * weight.scales[:, group].to(torch.float32)
        totals = quantized[:, group].sum(-1, dtype=torch.int32).to(torch.float32) * row_scales[:, group]
        outputs += totals[:, None] * weight.minimums[:, group].to(torch.float32)
    return outputs


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The last dimension as int8 -127 ... 127 and its scales float32: values ≈ quantized * scales[..., None]."""
    largest = values.abs().amax(-1)
    inverse = torch.where(largest > 0, INT8_MAX / largest, 0.0)
    return (values * inverse[..., None]).round_().to(torch.int8), largest / INT8_MAX


def integer_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left [m, k] int8 times right [n, k] int8 transposed, summed exactly: [m, n] float32 (rounded once, at the end)."""
    return torch._int_mm(left, right.t()).to(torch.float32)  # noqa: SLF001 - it has no public name


def rms_norm(values: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scales the last dimension to a root mean square of 1, then multiplies by `weight`."""
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True).add_(eps)) * weight
