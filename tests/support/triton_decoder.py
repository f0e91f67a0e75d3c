"""Triton's interpreter, and a tiny decoder that runs in it.

Whether kernels are interpreted is decided when they are imported: tests get the GPU backend from here.
"""

from __future__ import annotations

import os

# 0 where kernels are to be compiled: tests/support/compile_triton.py
os.environ.setdefault("TRITON_INTERPRET", "1")

from typing import Any

import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from engine.block_pool import Lease
from engine.kernels import triton_backend, triton_kernels
from engine.kernels.triton_backend import TritonKernels
from engine.kv_cache import KVCache
from engine.rotary import RotaryTable
from engine.sequence import Sequence
from engine.step import Chunk, StepInputs, prepare_step
from engine.weights import LayerWeights, ModelWeights, WeightFormats
from segue.kv_layout import KVLayout
from segue.models.config import QWEN3, ModelConfig, RopeConfig
from segue.sampling import SamplingParams

__all__ = ["TritonKernels", "interpreter", "triton_backend"]

MAX_CONTEXT = 256
# Holds the test's sequences several times over, so that their blocks can lie anywhere.
NUM_BLOCKS = 96

# So is it for Triton's own functions, such as tl.sum: torch may have imported them before.
if triton_kernels.interpreted.value:
    for module in (tl, tl.standard):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, interpreter.InterpretedFunction(value.fn))


def config(*, num_heads: int = 6, num_kv_heads: int = 2, head_dim: int = 12, qk_norm: bool = True) -> ModelConfig:
    return ModelConfig(
        architecture=QWEN3,
        num_layers=2,
        hidden_size=32,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=96,
        vocab_size=40,
        rms_norm_eps=1e-5,
        rope=RopeConfig(10_000.0),
        max_context=MAX_CONTEXT,
        tie_embeddings=False,
        attention_bias=True,
        attention_output_bias=False,
        mlp_bias=False,
        qk_norm=qk_norm,
        eos_token_ids=(),
        bos_token_id=None,
    )


def make_kernels(kind: Any, model: ModelConfig, *, block_size: int = 4, dtype: str = "float32") -> tuple[Any, KVCache]:
    """Kernels of class `kind` on a cache of their own, full of stale NaNs: no result may depend on it."""
    layout = KVLayout(model.num_layers, model.num_kv_heads, model.head_dim, block_size, dtype, "test")
    cache = KVCache.over(bytearray(b"\xff") * (NUM_BLOCKS * layout.block_bytes), layout, NUM_BLOCKS)
    return kind(model, cache, RotaryTable(model.rope, model.head_dim, model.max_context)), cache


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def make_sequences(lengths: list[int], block_size: int) -> list[Sequence]:
    """Of so many tokens, none computed, in blocks that lie in no order."""
    free = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
    sequences = []
    for index, length in enumerate(lengths):
        num_blocks = -(-length // block_size)
        lease, free = Lease(free[:num_blocks], 0), free[num_blocks:]
        tokens = [(7 * index + 3 * position) % 40 for position in range(length)]
        sequences.append(Sequence(index, tokens, SamplingParams(max_tokens=1), lease=lease))
    return sequences


def take_step(sequences: list[Sequence], counts: list[int], layout: KVLayout) -> StepInputs:
    """The next `counts` tokens of the sequences, which then count as computed."""
    chunks = [Chunk(sequence, count) for sequence, count in zip(sequences, counts, strict=True)]
    step = prepare_step(chunks, layout)
    for chunk in chunks:
        chunk.sequence.num_computed += chunk.num_tokens
    return step


def make_weights(model: ModelConfig, formats: WeightFormats) -> ModelWeights:
    seeds = iter(range(1000))

    def linear(name: str, num_outputs: int, num_inputs: int, bias: bool = False) -> Any:
        weight = random(num_outputs, num_inputs, seed=next(seeds), scale=2 * num_inputs**-0.5)
        return formats.convert(name, weight, random(num_outputs, seed=next(seeds)) if bias else None)

    def norm(*shape: int) -> torch.Tensor:
        return 1 + random(*shape, seed=next(seeds), scale=0.2)

    def layer(name: str) -> LayerWeights:
        hidden, width, heads = model.hidden_size, model.intermediate_size, model.num_heads + model.num_kv_heads
        return LayerWeights(
            input_norm=norm(hidden),
            qkv=linear(f"{name}.qkv", (heads + model.num_kv_heads) * model.head_dim, hidden, bias=model.attention_bias),
            qk_norm=norm(heads, model.head_dim) if model.qk_norm else None,
            attention_output=linear(f"{name}.attention_output", hidden, model.num_heads * model.head_dim),
            mlp_norm=norm(hidden),
            gate_up=linear(f"{name}.gate_up", 2 * width, hidden),
            down=linear(f"{name}.down", hidden, width),
        )

    return ModelWeights(
        embedding=random(model.vocab_size, model.hidden_size, seed=next(seeds)).to(formats.dtype),
        head=linear("head", model.vocab_size, model.hidden_size),
        final_norm=norm(model.hidden_size),
        layers=[layer(f"layers.{index}") for index in range(model.num_layers)],
    )
