"""Triton kernels of the GPU backend; engine/kernels/triton_backend.py launches them and says which runs when.

Not run on hardware: they are run by Triton's interpreter and compiled for NVIDIA GPUs, both in tests.

Shapes are those of the arguments' memory, row-major; names of `tl.constexpr` parameters say what is fixed when a kernel is
compiled. *Widths* are sizes rounded up to a power of two, as Triton wants them; what lies beyond the true size is masked.
No result depends on which other rows a launch computes: every sum runs in an order that the shape of one row alone decides.
Numbers that change from step to step are not specialized, which would compile kernels while requests wait.
"""

import triton
import triton.language as tl
from triton import knobs

# The interpreter truncates where hardware rounds to bfloat16, and cannot multiply in bfloat16.
interpreted = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def to_bfloat16(values):
    """float32 rounded to the nearest bfloat16, ties to even."""
    if interpreted:
        bits = values.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        values = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return values.to(tl.bfloat16)


@triton.jit
def to_int8(values, largest):
    """float32 of magnitudes up to `largest`, scaled to -127 ... 127 and rounded, ties to even."""
    values = values * tl.where(largest > 0, tl.div_rn(127.0, tl.where(largest > 0, largest, 1.0)), 0.0)
    # Adding 1.5 * 2**23 leaves no bits for a fraction. Launched without fused multiply-add, which would round once only.
    return ((values + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def inverse_rms(starts, exists, num_inputs, eps, width: tl.constexpr):
    """One over the root mean square of each row of inputs [rows, num_inputs] float32; pointers to rows that exist: [rows, 1]"""
    squares = tl.full((exists.shape[0], width), 0.0, tl.float32)
    for start in range(0, num_inputs, width):
        columns = (start + tl.arange(0, width))[None, :]
        values = tl.load(starts + columns, exists & (columns < num_inputs), 0.0)
        squares += values * values
    return tl.rsqrt(tl.sum(squares, 1) / num_inputs + eps)[:, None]


@triton.jit
def entering(starts, exists, factors, scale, columns, num_inputs, gated: tl.constexpr):
    """What enters a product at `columns` [1, width]: rows of inputs [num_inputs], or [2 * num_inputs] if gated, times their
    scale [rows, 1] and the factors [num_inputs] or None; zero where there is nothing. [rows, width] float32"""
    is_input = columns < num_inputs
    values = tl.load(starts + columns, exists & is_input, 0.0)
    if gated:
        values = values / (1.0 + tl.exp(-values)) * tl.load(starts + num_inputs + columns, exists & is_input, 0.0)
    if factors is not None:
        values = values * scale * tl.load(factors + columns, is_input, 0.0)
    return values


@triton.jit(do_not_specialize=["num_tokens"])
def enter_float(
    inputs,
    factors,
    outputs,
    num_tokens,
    num_inputs,
    eps,
    normed: tl.constexpr,
    gated: tl.constexpr,
    tile_rows: tl.constexpr,
    width: tl.constexpr,
):
    """RMSNorm (arXiv:1910.07467) or SwiGLU's product (arXiv:2002.05202), then factors: program [tile of rows].

    inputs [num_tokens, num_inputs, or twice that if gated], outputs [num_tokens, num_inputs], both float32.
    """
    rows = (tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)[:, None]
    exists, starts = rows < num_tokens, inputs + rows * num_inputs * (2 if gated else 1)
    scale = inverse_rms(starts, exists, num_inputs, eps, width) if normed else 1.0
    for start in range(0, num_inputs, width):
        columns = (start + tl.arange(0, width))[None, :]
        values = entering(starts, exists, factors, scale, columns, num_inputs, gated)
        tl.store(outputs + rows * num_inputs + columns, values, exists & (columns < num_inputs))


@triton.jit(do_not_specialize=["num_tokens"])
def enter_int8(
    inputs,
    factors,
    outputs,
    scales,
    num_tokens,
    num_inputs,
    eps,
    normed: tl.constexpr,
    gated: tl.constexpr,
    tile_rows: tl.constexpr,
    width: tl.constexpr,
):
    """As enter_float, then quantized with one scale for each row: outputs [num_tokens, num_inputs] int8, scales [num_tokens]
    float32."""
    rows = (tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)[:, None]
    exists, starts = rows < num_tokens, inputs + rows * num_inputs * (2 if gated else 1)
    scale = inverse_rms(starts, exists, num_inputs, eps, width) if normed else 1.0
    magnitudes = tl.full((tile_rows, width), 0.0, tl.float32)
    for start in range(0, num_inputs, width):
        columns = (start + tl.arange(0, width))[None, :]
        magnitudes = tl.maximum(magnitudes, tl.abs(entering(starts, exists, factors, scale, columns, num_inputs, gated)))
    largest = tl.max(magnitudes, 1)[:, None]
    for start in range(0, num_inputs, width):
        columns = (start + tl.arange(0, width))[None, :]
        values = entering(starts, exists, factors, scale, columns, num_inputs, gated)
        tl.store(outputs + rows * num_inputs + columns, to_int8(values, largest), exists & (columns < num_inputs))
    tl.store(scales + rows, tl.div_rn(largest, 127.0), exists)


@triton.jit(do_not_specialize=["num_tokens"])
def enter_int4(
    inputs,
    factors,
    outputs,
    scales,
    num_tokens,
    num_inputs,
    num_groups,
    eps,
    normed: tl.constexpr,
    gated: tl.constexpr,
    group_size: tl.constexpr,
    tile_rows: tl.constexpr,
    width: tl.constexpr,
):
    """As enter_float, then quantized with one scale for each group of inputs: outputs [num_tokens, num_groups * group_size]
    int8, scales [num_tokens, num_groups] float32. Groups beyond num_inputs become zeros."""
    rows = (tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)).to(tl.int64)[:, None]
    exists, starts = rows < num_tokens, inputs + rows * num_inputs * (2 if gated else 1)
    scale = inverse_rms(starts, exists, num_inputs, eps, width) if normed else 1.0
    num_outputs = num_groups * group_size
    for start in range(0, num_outputs, width):
        columns = (start + tl.arange(0, width))[None, :]
        values = entering(starts, exists, factors, scale, columns, num_inputs, gated)
        values = tl.reshape(values, (tile_rows, width // group_size, group_size))
        largest = tl.max(tl.abs(values), 2)
        quantized = tl.reshape(to_int8(values, largest[:, :, None]), (tile_rows, width))
        tl.store(outputs + rows * num_outputs + columns, quantized, exists & (columns < num_outputs))
        groups = (start // group_size + tl.arange(0, width // group_size))[None, :]
        tl.store(scales + rows * num_groups + groups, tl.div_rn(largest, 127.0), exists & (groups < num_groups))


@triton.jit
def write_tile(results, bias, outputs, rows, columns, num_tokens, num_outputs, add: tl.constexpr):
    """Writes results, or adds them, to a tile of outputs [num_tokens, num_outputs] float32; bias [num_outputs] or None."""
    exists = (rows < num_tokens)[:, None] & (columns < num_outputs)[None, :]
    targets = outputs + rows.to(tl.int64)[:, None] * num_outputs + columns[None, :]
    if bias is not None:
        results += tl.load(bias + columns, columns < num_outputs, 0.0)[None, :]
    if add:
        results += tl.load(targets, exists, 0.0)
    tl.store(targets, results, exists)


@triton.jit(do_not_specialize=["num_tokens"])
def float_product(
    inputs,
    weight,
    bias,
    outputs,
    num_tokens,
    num_outputs,
    num_inputs,
    add: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,
):
    """inputs [num_tokens, num_inputs] float32 times weight [num_outputs, num_inputs] float32 or bfloat16: program [tile of
    rows, tile of outputs]. Inputs are rounded to the weight's type; sums are float32. Tensor cores multiply float32 as three
    products of TensorFloat-32, which is about as exact."""
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    columns = tl.program_id(1) * tile_outputs + tl.arange(0, tile_outputs)
    left = inputs + rows.to(tl.int64)[:, None] * num_inputs
    right = weight + columns.to(tl.int64)[None, :] * num_inputs
    sums = tl.full((tile_rows, tile_outputs), 0.0, tl.float32)
    for start in range(0, num_inputs, tile_inputs):
        inner = start + tl.arange(0, tile_inputs)
        is_inner = inner < num_inputs
        values = tl.load(left + inner[None, :], (rows < num_tokens)[:, None] & is_inner[None, :], 0.0)
        weights = tl.load(right + inner[:, None], is_inner[:, None] & (columns < num_outputs)[None, :], 0.0)
        if weight.dtype.element_ty == tl.bfloat16:
            values = to_bfloat16(values)
            if interpreted:
                values, weights = values.to(tl.float32), weights.to(tl.float32)
        sums = tl.dot(values, weights, sums, input_precision="tf32x3")
    write_tile(sums, bias, outputs, rows, columns, num_tokens, num_outputs, add)


@triton.jit(do_not_specialize=["num_tokens"])
def int8_product(
    inputs,
    input_scales,
    weight,
    weight_scales,
    bias,
    outputs,
    num_tokens,
    num_outputs,
    num_inputs,
    add: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,
):
    """inputs [num_tokens, num_inputs] int8 with scales [num_tokens] times weight [num_outputs, num_inputs] int8 with scales
    [num_outputs]: program [tile of rows, tile of outputs]. Sums are int32, exact up to 133,000 inputs."""
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    columns = tl.program_id(1) * tile_outputs + tl.arange(0, tile_outputs)
    left = inputs + rows.to(tl.int64)[:, None] * num_inputs
    right = weight + columns.to(tl.int64)[None, :] * num_inputs
    sums = tl.full((tile_rows, tile_outputs), 0, tl.int32)
    for start in range(0, num_inputs, tile_inputs):
        inner = start + tl.arange(0, tile_inputs)
        is_inner = inner < num_inputs
        values = tl.load(left + inner[None, :], (rows < num_tokens)[:, None] & is_inner[None, :], 0)
        weights = tl.load(right + inner[:, None], is_inner[:, None] & (columns < num_outputs)[None, :], 0)
        sums = tl.dot(values, weights, sums, out_dtype=tl.int32)
    results = sums.to(tl.float32) * tl.load(input_scales + rows, rows < num_tokens, 0.0)[:, None]
    results *= tl.load(weight_scales + columns, columns < num_outputs, 0.0)[None, :]
    write_tile(results, bias, outputs, rows, columns, num_tokens, num_outputs, add)


@triton.jit
def group_product(weights, inputs, input_scales, weight_scales, minimums, is_row, is_output):
    """One group's part of an int4 product: weights [group_size, outputs] int8 0 ... 15; pointers to inputs [rows, group_size]
    int8 and scales [rows] float32, to weight scales and minimums [outputs] float16. [rows, outputs] float32"""
    values = tl.load(inputs, is_row[:, None], 0)
    scales = tl.load(input_scales, is_row, 0.0)
    sums = tl.dot(values, weights, out_dtype=tl.int32).to(tl.float32) * scales[:, None]
    totals = tl.sum(values.to(tl.int32), 1).to(tl.float32) * scales
    results = sums * tl.load(weight_scales, is_output, 0.0).to(tl.float32)[None, :]
    return results + totals[:, None] * tl.load(minimums, is_output, 0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["num_tokens"])
def int4_product(
    inputs,
    input_scales,
    weight,
    weight_scales,
    minimums,
    bias,
    outputs,
    num_tokens,
    num_outputs,
    num_pairs,
    add: tl.constexpr,
    group_size: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
):
    """Groups come in pairs: byte [output, pair, i] of weight holds element i of the pair's first group in its low four bits, of
    the second in its high four. inputs [num_tokens, pairs, 2, group_size] int8, their scales [num_tokens, pairs, 2] float32;
    weight scales and minimums [pairs, 2, num_outputs] float16. Sums are int32 in a group, float32 from group to group."""
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    columns = tl.program_id(1) * tile_outputs + tl.arange(0, tile_outputs)
    inner = tl.arange(0, group_size)
    is_row, is_output = rows < num_tokens, columns < num_outputs
    rows_64 = rows.to(tl.int64)
    left = inputs + rows_64[:, None] * num_pairs * 2 * group_size + inner[None, :]
    left_scales = input_scales + rows_64 * num_pairs * 2
    right = weight + columns.to(tl.int64)[None, :] * num_pairs * group_size + inner[:, None]
    right_scales, right_minimums = weight_scales + columns, minimums + columns
    sums = tl.full((tile_rows, tile_outputs), 0.0, tl.float32)
    for _ in range(num_pairs):
        packed = tl.load(right, is_output[None, :], 0)
        low, high = (packed & 15).to(tl.int8), (packed >> 4).to(tl.int8)
        sums += group_product(low, left, left_scales, right_scales, right_minimums, is_row, is_output)
        left, left_scales = left + group_size, left_scales + 1
        right_scales, right_minimums = right_scales + num_outputs, right_minimums + num_outputs
        sums += group_product(high, left, left_scales, right_scales, right_minimums, is_row, is_output)
        left, left_scales = left + group_size, left_scales + 1
        right_scales, right_minimums = right_scales + num_outputs, right_minimums + num_outputs
        right += group_size
    write_tile(sums, bias, outputs, rows, columns, num_tokens, num_outputs, add)
