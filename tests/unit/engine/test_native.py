"""The C++ kernels on every instruction set: the results of the torch reference, and the same bits whatever else is in a batch,
on however many threads, and on AVX2, AVX-512 and AVX-512 with VNNI alike."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.block_pool import Lease
from engine.kernels.base import Kernels
from engine.kernels.native import NativeKernels, built_library, instruction_sets
from engine.kernels.reference import TorchKernels
from engine.kv_cache import KVCache
from engine.linear import FloatWeight, Linear, Weight
from engine.quantization import quantize_int4, quantize_int8
from engine.rotary import RotaryTable
from engine.step import Piece, StepInputs
from segue.kv_layout import KVLayout
from segue.models.config import RopeConfig
from tests.support.native_library import build_emulated_library

SETS = ["avx512bf16", "avx512vnni", "avx512", "avx2", "portable"]
FUSED = SETS[:4]
NUM_BLOCKS = 40
FORMATS = ["float32", "bfloat16", "int8", "int4"]
PROLOGUES = ["none", "norm", "gated", "scales", "norm+scales"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """With everything that this processor has, and AVX-512 emulated."""
    if "avx2" not in instruction_sets(built_library()):
        pytest.skip("emulating AVX-512 takes a processor with AVX2")
    return build_emulated_library(tmp_path_factory.mktemp("native"))


class Bed:
    """Kernels of one shape over a cache of their own."""

    def __init__(self, heads: tuple[int, int, int] = (4, 2, 16), block_size: int = 4, dtype: str = "float32") -> None:
        num_heads, num_kv_heads, head_dim = heads
        self.config: Any = SimpleNamespace(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, rms_norm_eps=1e-5)
        self.layout = KVLayout(2, num_kv_heads, head_dim, block_size, dtype, "r")
        self.rotary = RotaryTable(RopeConfig(1e4), head_dim, 256)

    def cache(self) -> KVCache:
        return KVCache.over(bytearray(b"\x42") * (NUM_BLOCKS * self.layout.block_bytes), self.layout, NUM_BLOCKS)

    def native(self, library: ctypes.CDLL, name: str, threads: int = 1) -> NativeKernels:
        return NativeKernels(library, name, self.config, self.cache(), self.rotary, threads=threads)

    def torch(self) -> TorchKernels:
        return TorchKernels(self.config, self.cache(), self.rotary)


def weight_of(name: str, num_outputs: int, num_inputs: int) -> Weight:
    weight = torch.randn(num_outputs, num_inputs)
    if name == "int8":
        return quantize_int8(weight)[0]
    return quantize_int4(weight) if name == "int4" else FloatWeight(weight.to(getattr(torch, name)))


def packed(kernels: Kernels[Any, Any], linear: Linear, prologue: str) -> Any:
    norm = torch.linspace(0.5, 1.5, linear.num_inputs) if "norm" in prologue else None
    return kernels.pack(linear, norm=norm, gated=prologue == "gated")


def linear_cases(name: str) -> Iterator[tuple[Linear, str, torch.Tensor, torch.Tensor | None]]:
    """Layer, prologue, inputs and what is added to; shapes that fill neither panels nor tiles among them."""
    torch.manual_seed(3)
    for num_inputs, num_outputs in ((64, 33), (48, 16), (576, 72)):
        if name == "int4" and num_inputs % 32:
            continue
        weight = weight_of(name, num_outputs, num_inputs)
        for prologue in PROLOGUES:
            bias = torch.randn(num_outputs) if num_outputs % 2 else None
            scales = torch.rand(num_inputs) + 0.5 if "scales" in prologue else None
            for num_rows in (1, 5, 13, 40):
                inputs = torch.randn(num_rows, num_inputs * (2 if prologue == "gated" else 1))
                add_to = torch.randn(num_rows, num_outputs) if num_rows % 4 == 1 else None
                yield Linear(weight, bias, scales), prologue, inputs, add_to


def product(kernels: Kernels[Any, Any], layer: Any, inputs: torch.Tensor, add_to: torch.Tensor | None) -> torch.Tensor:
    return kernels.linear(layer, inputs.contiguous(), add_to=None if add_to is None else add_to.clone()).clone()


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("weights", FORMATS)
def test_linear_layers_are_those_of_torch_and_each_row_stands_alone(weights, name, library):
    reference, native = Bed().torch(), Bed().native(library, name)
    # The reference rounds bfloat16 layers' inputs as well.
    tolerance = 0.01 if weights == "bfloat16" else 1e-5
    for linear, prologue, inputs, add_to in linear_cases(weights):
        expected = product(reference, packed(reference, linear, prologue), inputs, add_to)
        layer = packed(native, linear, prologue)
        outputs = product(native, layer, inputs, add_to)
        assert (outputs - expected).abs().max() < tolerance * expected.abs().max()
        for row in range(0, len(inputs), 3):
            one = slice(row, row + 1)
            assert torch.equal(product(native, layer, inputs[one], None if add_to is None else add_to[one])[0], outputs[row])


@pytest.mark.parametrize("weights", FORMATS)
def test_linear_layers_have_the_same_bits_everywhere(weights, library):
    kernels = [Bed().native(library, name) for name in FUSED] + [Bed().native(library, "avx2", threads=3)]
    for linear, prologue, inputs, add_to in linear_cases(weights):
        first, *others = [product(each, packed(each, linear, prologue), inputs, add_to) for each in kernels]
        assert all(torch.equal(first, other) for other in others)


def test_no_sum_of_products_overflows(library):
    """The largest numbers there are, all of one sign."""
    linear = Linear(quantize_int8(torch.ones(16, 1536))[0])
    grid = torch.tensor([0.0, 15.0]).repeat(16, 768)
    for name in SETS:
        native = Bed().native(library, name)
        assert torch.equal(native.linear(native.pack(linear), torch.full((1, 1536), -3.0)), torch.full((1, 16), -3.0 * 1536))
        outputs = native.linear(native.pack(Linear(quantize_int4(grid))), torch.full((1, 1536), 127.0))
        assert torch.allclose(outputs, torch.full((1, 16), 127.0 * 15 * 768), rtol=1e-6)


def run_attention(bed: Bed, kernels: Kernels[Any, Any], pieces: list[Piece], qk_norm: torch.Tensor | None) -> torch.Tensor:
    """Rotated heads and attention's outputs, side by side: one row for each token of the pieces."""
    width = (bed.config.num_heads + 2 * bed.config.num_kv_heads) * bed.config.head_dim
    generator = torch.Generator().manual_seed(5)
    contexts = [torch.randn(piece.end, width, generator=generator) for piece in pieces]
    for piece, context in zip(pieces, contexts, strict=True):
        if piece.start:
            before = kernels.prepare(inputs_of([Piece(0, 0, 0, piece.start, piece.lease)]))
            kernels.rotate_and_write(1, context[: piece.start].clone(), qk_norm, before)
    heads = torch.cat([context[piece.start :] for piece, context in zip(pieces, contexts, strict=True)])
    step = kernels.prepare(inputs_of(pieces))
    kernels.rotate_and_write(1, heads, qk_norm, step)
    return torch.cat([heads, kernels.attend(1, heads, step)], -1)


def inputs_of(pieces: list[Piece]) -> StepInputs:
    positions = torch.cat([torch.arange(piece.start, piece.end) for piece in pieces])
    return StepInputs(torch.zeros_like(positions), positions, pieces, 0, positions[:0], [])


def make_pieces(bed: Bed) -> list[Piece]:
    """A first token, a decode step deep in a context, chunks from the start and from the middle of a block."""
    blocks = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
    pieces: list[Piece] = []
    for start, end in ((0, 1), (30, 31), (5, 50), (0, 23), (17, 18)):
        num_blocks = bed.layout.num_blocks_for(end)
        if num_blocks <= len(blocks):
            first_row = sum(piece.num_rows for piece in pieces)
            pieces.append(Piece(len(pieces), first_row, start, end, Lease(blocks[:num_blocks], 0)))
            del blocks[:num_blocks]
    return pieces


SHAPES = [((4, 2, 16), 4), ((9, 3, 64), 16), ((9, 3, 64), 32), ((6, 2, 12), 3), ((4, 4, 8), 16)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("heads", "block_size"), SHAPES)
def test_attention_is_that_of_torch_and_has_the_same_bits_everywhere(heads, block_size, dtype, library):
    bed = Bed(heads, block_size, dtype)
    pieces = make_pieces(bed)
    for qk_norm in (None, torch.linspace(0.5, 1.5, (heads[0] + heads[1]) * heads[2]).view(-1, heads[2])):
        expected = run_attention(bed, bed.torch(), pieces, qk_norm)
        results = [run_attention(bed, bed.native(library, name), pieces, qk_norm) for name in SETS]
        # Weights are rounded to bfloat16 beside the largest score so far, which in torch is the largest of all.
        tolerance = 4e-3 if dtype == "bfloat16" else 1e-5
        assert all((result - expected).abs().max() < tolerance * expected.abs().max() for result in results)
        assert all(torch.equal(results[0], other) for other in results[:4])
        # With more threads than pieces each head of a single token is a task of its own, with fewer several are one.
        for threads in (3, len(pieces) + 1):
            assert torch.equal(run_attention(bed, bed.native(library, "avx2", threads=threads), pieces, qk_norm), results[0])


def test_cached_numbers_are_those_of_torch(library):
    for dtype in ("float32", "bfloat16", "int8"):
        bed = Bed(dtype=dtype)
        pieces, reference, native = make_pieces(bed), bed.torch(), bed.native(library, "avx2")
        for kernels in (reference, native):
            run_attention(bed, kernels, pieces, None)
        ours, theirs = native.cache.keys(1).float(), reference.cache.keys(1).float()
        # Rounding of the rotation may move an int8 number to its neighbour.
        assert (ours - theirs).abs().max() <= (1 if dtype == "int8" else 0.02)
        assert (ours == theirs).float().mean() > 0.99 or dtype == "float32"


def test_source_files_are_built() -> None:
    """Each source and header is named in pyproject.toml: a header that is not would be missing from the source package."""
    root = Path(__file__).parents[3]
    text = (root / "pyproject.toml").read_text()
    files = [file.relative_to(root) for file in (root / "engine" / "kernels" / "csrc").iterdir()]
    assert len(files) > 10
    assert all(f'"{file}"' in text for file in files)
