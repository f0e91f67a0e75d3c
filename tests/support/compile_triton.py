"""Compiles the GPU backend's kernels, as a forward pass launches them, for an NVIDIA GPU that need not be there, and prints
their names. Run in a process of its own, with TRITON_INTERPRET=0."""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from engine.linear import Linear
from engine.model import Decoder
from engine.quantization import quantize_int4
from engine.weights import WeightFormats
from tests.support.triton_decoder import (
    TritonKernels,
    config,
    make_kernels,
    make_sequences,
    make_weights,
    random,
    take_step,
)

AMPERE = GPUTarget("cuda", 80, 32)
# By name. Each is compiled as it is launched first.
compiled: dict[str, Any] = {}


def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Takes the place of a launch."""
    if function.__name__ in compiled:
        return
    values = dict(zip(function.arg_names, args, strict=False))
    values |= {name: options.pop(name) for name in list(options) if name in function.arg_names}
    fixed = {p.name for p in function.params if p.is_constexpr or values[p.name] is None}
    signature = {name: "constexpr" if name in fixed else mangle_type(values[name]) for name in function.arg_names}
    constants = {(index,): values[name] for index, name in enumerate(function.arg_names) if name in fixed}
    source = ASTSource(function, signature, constants)
    compiled[function.__name__] = triton.compile(source, target=AMPERE, options=options)


def main() -> None:
    JITFunction.run = compile_only
    model = config(head_dim=16, qk_norm=False)
    kernels, cache = make_kernels(TritonKernels, model, dtype="int8")
    formats = WeightFormats(dtype=torch.bfloat16, quantization="int8", keep_float=frozenset({"down"}))
    decoder = Decoder(make_weights(model, formats), kernels)
    decoder.forward(take_step(make_sequences([5], 4), [5], cache.layout))
    kernels.linear(kernels.pack(Linear(quantize_int4(random(64, 64)))), random(4, 64))
    sys.stdout.write(" ".join(sorted(compiled)))


if __name__ == "__main__":
    main()
