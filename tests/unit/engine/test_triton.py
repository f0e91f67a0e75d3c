"""The GPU backend against the torch backend, in Triton's interpreter; and that its kernels compile for a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.kernels.reference import TorchKernels
from engine.linear import FloatWeight, Linear
from engine.model import Decoder
from engine.quantization import quantize_int4, quantize_int8
from engine.weights import WeightFormats
from segue.errors import InternalError
from tests.support.triton_decoder import (
    TritonKernels,
    config,
    interpreter,
    make_kernels,
    make_sequences,
    make_weights,
    random,
    take_step,
    triton_backend,
)

WEIGHTS = {
    "float32": FloatWeight,
    "bfloat16": lambda values: FloatWeight(values.to(torch.bfloat16)),
    "int8": lambda values: quantize_int8(values)[0],
    "int4": quantize_int4,
}
REPO = Path(__file__).parents[3]
FLOAT_KERNELS, INT_KERNELS = ["enter_float", "float_product"], ["enter_int4", "enter_int8", "int4_product", "int8_product"]
# Rounding of activations to fewer bits may fall to the other side where sums before it differ in their last bit.
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 1e-2, "int4": 1e-2}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes milliseconds for a program, however much it computes."""
    monkeypatch.setattr(triton_backend, "_ENTER_ROWS", 16)


@pytest.fixture(scope="module")
def both():
    """The torch backend and Triton's, for operations that do not touch the cache."""
    return make_kernels(TorchKernels, config())[0], make_kernels(TritonKernels, config())[0]


def assert_close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(("num_tokens", "num_inputs"), [(1, 96), (37, 64)])
def test_product_bias_and_sum(weight, num_inputs, num_tokens, both):
    linear = Linear(WEIGHTS[weight](random(70, num_inputs)), bias=random(70, seed=1))
    inputs, total = random(num_tokens, num_inputs, seed=2, scale=3), random(num_tokens, 70, seed=3)
    results, sums = [], []
    for kernels in both:
        layer = kernels.pack(linear)
        results.append(kernels.linear(layer, inputs))
        target = total.clone()
        assert kernels.linear(layer, inputs, add_to=target) is target
        sums.append(target)
    # Torch rounds a product with bfloat16 weights to bfloat16; the integer formats round what is given, and sum exactly.
    tolerance = 2**-8 if weight == "bfloat16" else 2e-6
    assert_close(results[1], results[0], tolerance)
    assert_close(sums[1], sums[0], tolerance)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("prologue", ["plain", "norm", "gated"])
@pytest.mark.parametrize("row_width", [32, 2048])
def test_what_is_applied_to_inputs_first(weight, scaled, prologue, row_width, both, monkeypatch):
    monkeypatch.setattr(triton_backend, "_MAX_ROW_WIDTH", row_width)
    monkeypatch.setattr(triton_backend, "_ENTER_ROWS", 1 if row_width == 32 else 4)
    linear = Linear(WEIGHTS[weight](random(20, 96)), input_scales=1 + random(96, seed=1, scale=0.3) if scaled else None)
    inputs = random(3, 192 if prologue == "gated" else 96, seed=2)
    norm = 1 + random(96, seed=3, scale=0.2) if prologue == "norm" else None
    expected, actual = (kernels.linear(kernels.pack(linear, norm=norm, gated=prologue == "gated"), inputs) for kernels in both)
    assert_close(actual, expected, TOLERANCES[weight])


@pytest.mark.parametrize("weight", WEIGHTS)
def test_no_tokens_and_zeros(weight, both):
    kernels = both[1]
    layer = kernels.pack(Linear(WEIGHTS[weight](random(20, 96))), gated=True)
    assert kernels.linear(layer, torch.zeros(0, 192)).shape == (0, 20)
    assert not kernels.linear(layer, torch.zeros(2, 192)).any()


def test_a_layer_has_a_norm_or_gated_inputs(both):
    with pytest.raises(InternalError, match="either a norm or gated"):
        both[1].pack(Linear(FloatWeight(random(8, 8))), norm=torch.ones(8), gated=True)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size", "num_heads", "num_kv_heads"),
    [
        ("float32", 12, 4, 6, 2),
        ("float32", 80, 5, 2, 2),
        ("bfloat16", 16, 32, 3, 3),
        ("bfloat16", 12, 1, 5, 1),
        ("int8", 64, 16, 6, 2),
        ("int8", 12, 3, 1, 1),
    ],
)
def test_rotation_writing_and_attention(dtype, head_dim, block_size, num_heads, num_kv_heads):
    model = config(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    qk_norm = 1 + random(num_heads + num_kv_heads, head_dim, seed=9, scale=0.2)
    attended, caches = [], []
    for kind in (TorchKernels, TritonKernels):
        kernels, cache = make_kernels(kind, model, block_size=block_size, dtype=dtype)
        sequences = make_sequences([40, 7, 34], block_size)
        # From the beginning, from the middle of a block, single tokens beside longer chunks, many pieces.
        for seed, counts in enumerate([[1, 6, 33], [38, 1, 1]]):
            step = kernels.prepare(take_step(sequences, counts, cache.layout))
            for layer in range(2):
                heads = random(sum(counts), (num_heads + 2 * num_kv_heads) * head_dim, seed=2 * seed + layer)
                # Without the norm rotated heads have the same bits, and so have their cells.
                kernels.rotate_and_write(layer, heads, qk_norm if layer else None, step)
                attended.append((heads, kernels.attend(layer, heads, step)))
        caches.append(cache)
    for (expected_heads, expected), (heads, actual) in zip(attended[:4], attended[4:], strict=True):
        assert_close(heads, expected_heads, 1e-6)
        assert_close(actual, expected, 1e-5 if dtype == "float32" else 1e-2)
    assert torch.equal(caches[1].layers[0], caches[0].layers[0])
    for view in ("keys", "values"):
        expected, actual = (getattr(cache, view)(1).to(torch.float32).nan_to_num() for cache in caches)
        assert (actual - expected).abs().max() <= {"float32": 1e-5, "bfloat16": 2**-6, "int8": 1}[dtype]


@pytest.mark.parametrize(("weight", "dtype"), [("float32", "float32"), ("bfloat16", "int8"), ("int8", "bfloat16")])
def test_decoder(weight, dtype):
    model = config()
    formats = WeightFormats(
        dtype=torch.bfloat16 if weight == "bfloat16" else torch.float32,
        quantization="int8" if weight == "int8" else "none",
        smoothing={"layers.1.down": 1 + random(96, seed=5, scale=0.3)},
    )
    weights = make_weights(model, formats)
    logits = []
    for kind in (TorchKernels, TritonKernels):
        kernels, cache = make_kernels(kind, model, dtype=dtype)
        decoder = Decoder(weights, kernels)
        sequences = make_sequences([9, 6], 4)
        steps = [[8, 3], [1, 3]]
        logits.append([decoder.forward(take_step(sequences, counts, cache.layout)) for counts in steps])
    assert [len(part) for part in logits[1]] == [0, 2]
    assert_close(logits[1][1], logits[0][1], 1e-5 if weight == "float32" else 5e-2)


@pytest.fixture
def ordered_sums(monkeypatch):
    """Matrix products that sum in order, as hardware does: numpy's add up a row differently from place to place in a matrix."""

    def create_dot(builder, left, right, total, *precision):
        sums = (left.data[:, :, None] * right.data[None].astype(total.data.dtype)).sum(1, dtype=total.data.dtype)
        return interpreter.TensorHandle(sums + total.data, total.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_row_of_a_product_does_not_depend_on_others(weight, both, ordered_sums):
    layer = both[1].pack(Linear(WEIGHTS[weight](random(20, 96))), norm=1 + random(96, seed=1, scale=0.2))
    inputs = random(35, 96, seed=2)
    together = both[1].linear(layer, inputs)
    for row in (17, 34):
        assert torch.equal(both[1].linear(layer, inputs[row : row + 1]), together[row : row + 1])


def test_a_sequence_gets_the_same_logits_alone_and_beside_others(ordered_sums):
    """In another order too, so in other rows and tiles."""
    model = replace(config(num_heads=3, num_kv_heads=1), num_layers=1)
    weights = make_weights(model, WeightFormats())

    def run(order):
        kernels, cache = make_kernels(TritonKernels, model, dtype="int8")
        decoder = Decoder(weights, kernels)
        sequences = make_sequences([37, 5, 20], 4)
        chosen = [sequences[index] for index in order]
        for counts in ([36, 4, 3], [1, 1, 17]):
            step = take_step(chosen, [counts[index] for index in order], cache.layout)
            logits = decoder.forward(step)
        return {order[index]: row for index, row in zip(step.sampled_chunks, logits, strict=True)}

    together = run([0, 1, 2])
    for order in ([2, 1, 0], [1], [2]):
        for index, row in run(order).items():
            assert torch.equal(row, together[index])


def test_kernels_compile_for_a_gpu(tmp_path):
    """All the way to machine code: the compiler needs no GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.support.compile_triton"]
    compiled = subprocess.run(command, env=environment, cwd=REPO, check=True, capture_output=True, text=True).stdout.split()
    assert compiled == sorted([*FLOAT_KERNELS, *INT_KERNELS, "attend", "rotate_and_write"])
