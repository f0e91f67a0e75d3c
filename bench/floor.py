"""The time below which a machine cannot do an engine's work: arithmetic or the reading of memory alone, whichever takes longer,
at the rates that the machine reaches in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from engine.kernels.base import Kernels
from engine.linear import FloatWeight, Linear, Weight
from engine.quantization import quantize_int4, quantize_int8
from segue.models.config import ModelConfig

# Bytes that one weight takes: int4 with its group's scale and minimum; its output head is int8.
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.625}
HEAD_BYTES = WEIGHT_BYTES | {"int4": 1.0}
_ROWS, _INPUTS, _OUTPUTS = 1024, 576, 3072


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine reaches on the engine's threads."""

    # Multiplications and additions per second in a large product with weights of the engine's format.
    product_ops: float
    # The same in a product of float32, of which attention consists.
    float_ops: float
    # Bytes read per second from memory that no cache holds.
    bytes: float


@dataclass(frozen=True, slots=True)
class Work:
    """Arithmetic and memory traffic of one forward pass, counted from the model's shape."""

    config: ModelConfig
    weight_bytes: float
    head_bytes: float
    # Bytes of one number in the KV cache.
    kv_bytes: float

    @property
    def layer_weights(self) -> int:
        """Elements of the linear layers, without the output head."""
        config = self.config
        heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        return config.num_layers * config.hidden_size * (heads + 3 * config.intermediate_size)

    @property
    def head_weights(self) -> int:
        return self.config.hidden_size * self.config.vocab_size

    @property
    def bytes(self) -> float:
        """Of all weights."""
        return self.layer_weights * self.weight_bytes + self.head_weights * self.head_bytes

    def prefill_floor_s(self, num_tokens: int, rates: Rates) -> float:
        """One prompt and its first token. Attention is causal: half of all pairs."""
        products = 2 * num_tokens * self.layer_weights + 2 * self.head_weights
        attention = 2 * num_tokens * num_tokens * self.config.num_heads * self.config.head_dim * self.config.num_layers
        num_bytes = self.bytes
        return max(products / rates.product_ops + attention / rates.float_ops, num_bytes / rates.bytes)

    def decode_floor_s(self, batch_size: int, context: int, rates: Rates) -> float:
        """One step: every weight and every context's KV is read once."""
        config = self.config
        weights = self.layer_weights + self.head_weights
        attention = 4 * batch_size * context * config.num_heads * config.head_dim * config.num_layers
        kv = 2 * batch_size * context * config.num_kv_heads * config.head_dim * config.num_layers
        arithmetic = 2 * batch_size * weights / rates.product_ops + attention / rates.float_ops
        return max(arithmetic, (self.bytes + kv * self.kv_bytes) / rates.bytes)


def measure_rates(weights: str, kernels: Kernels[Any, Any]) -> Rates:
    """The best of several tries each, of torch's operations and of the engine's own; on the calling thread's torch threads and
    the kernels' own. `weights` is a key of WEIGHT_BYTES."""
    left, right = torch.randn(_ROWS, _INPUTS), torch.randn(_OUTPUTS, _INPUTS)
    float_s = min(best_s(lambda: torch.mm(left, right.t())), _own_s(kernels, FloatWeight(right), left))
    product_s = float_s
    if weights == "bfloat16":
        product_s = _own_s(kernels, FloatWeight(right.to(torch.bfloat16)), left)
    elif weights == "int4":
        product_s = _own_s(kernels, quantize_int4(right), left)
    elif weights == "int8":
        quantized, _ = quantize_int8(right)
        integers = torch.randint(-127, 128, (_ROWS, _INPUTS), dtype=torch.int8)
        torch_s = best_s(lambda: torch._int_mm(integers, quantized.values.t()))  # noqa: SLF001 - it has no public name
        product_s = min(torch_s, _own_s(kernels, quantized, left))
    memory = torch.zeros(2**26)  # 256 MiB of float32
    num_ops = 2 * _ROWS * _INPUTS * _OUTPUTS
    return Rates(num_ops / product_s, num_ops / float_s, memory.nbytes / best_s(memory.sum))


def _own_s(kernels: Kernels[Any, Any], weight: Weight, inputs: torch.Tensor) -> float:
    layer = kernels.pack(Linear(weight))
    return best_s(lambda: kernels.linear(layer, inputs))


def best_s(work: Callable[[], object], tries: int = 8) -> float:
    """Seconds that `work` takes when it takes least."""

    def one_s() -> float:
        begin_s = time.perf_counter()
        work()
        return time.perf_counter() - begin_s

    work()
    return min(one_s() for _ in range(tries))
