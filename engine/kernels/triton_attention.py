"""Triton kernels for what touches the KV cache: rotary embedding with the write of K and V, and attention.

Not run on hardware: they are run by Triton's interpreter and compiled for NVIDIA GPUs, both in tests.

`cells` is a layer's cache in its dtype, [num_blocks, 2, num_kv_heads, slab] as segue/kv_layout.py lays it out; in int8 the same
memory is passed again as float32, for the scales behind each slab's values. What a step brings: `positions` and `pieces`
[tokens] (of each token the piece it belongs to), `block_table` [pieces, table_width], `tiles` [tiles, 3], all int32.
"""

import triton
import triton.language as tl

from engine.kernels.triton_kernels import to_bfloat16, to_int8


@triton.jit(do_not_specialize=["table_width"])
def rotate_and_write(
    heads,
    qk_norm,
    rotary,
    num_tokens,
    positions,
    pieces,
    block_table,
    cells,
    scales,
    table_width,
    eps,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    tile_rows: tl.constexpr,
    half_width: tl.constexpr,
):
    """Program [tile of tokens, head]: RMSNorm by qk_norm [num_heads + num_kv_heads, head_dim] or None and rotary embedding
    (arXiv:2104.09864, the rotate-half kind) of a q or k head of heads [tokens, num_heads + 2 * num_kv_heads, head_dim] float32,
    in place; K and V go into the cache. rotary [positions, head_dim] float32: cosines, then sines.

    Tokens from num_tokens [1] int32 on are padding: they read and write nothing.
    """
    rows = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    head = tl.program_id(1)
    half: tl.constexpr = head_dim // 2
    columns = tl.arange(0, half_width)
    is_row, is_column = rows < tl.load(num_tokens), columns < half
    exists = is_row[:, None] & is_column[None, :]
    sources = heads + (rows.to(tl.int64) * (num_heads + 2 * num_kv_heads) + head)[:, None] * head_dim + columns[None, :]
    first, second = tl.load(sources, exists, 0.0), tl.load(sources + half, exists, 0.0)
    places = tl.load(positions + rows, is_row, 0)
    if head < num_heads + num_kv_heads:
        if qk_norm is not None:
            scale = tl.rsqrt(tl.sum(first * first + second * second, 1) / head_dim + eps)[:, None]
            norm = qk_norm + head * head_dim + columns
            first = first * scale * tl.load(norm, is_column, 0.0)[None, :]
            second = second * scale * tl.load(norm + half, is_column, 0.0)[None, :]
        angles = rotary + places.to(tl.int64)[:, None] * head_dim + columns[None, :]
        cos, sin = tl.load(angles, exists, 0.0), tl.load(angles + half, exists, 0.0)
        rotated = first * cos - second * sin
        second = second * cos + first * sin
        first = rotated
        tl.store(sources, first, exists)
        tl.store(sources + half, second, exists)
    if head >= num_heads:
        owners = tl.load(pieces + rows, is_row, 0).to(tl.int64)
        blocks = tl.load(block_table + owners * table_width + places // block_size, is_row, 0).to(tl.int64)
        # Of a block's slabs: K of each head, then V of each head.
        slabs = blocks * 2 * num_kv_heads + head - num_heads
        is_key = head < num_heads + num_kv_heads
        write_cells(cells, scales, slabs, is_key, places % block_size, first, second, exists, head_dim, block_size)


@triton.jit
def write_cells(cells, scales, slabs, is_key, offsets, first, second, exists, head_dim: tl.constexpr, block_size: tl.constexpr):
    """Writes vectors, given as halves [rows, half_width] float32, each at its offset of its slab [rows]."""
    num_values: tl.constexpr = head_dim * block_size
    # In the elements of `cells`, in which one scale takes as much as four int8.
    slab_size: tl.constexpr = num_values + (4 * block_size if scales is not None else 0)
    if scales is not None:
        largest = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
        targets = scales + slabs * (slab_size // 4) + num_values // 4 + offsets
        tl.store(targets, tl.div_rn(largest, 127.0), tl.max(exists.to(tl.int32), 1) > 0)
        first, second = to_int8(first, largest[:, None]), to_int8(second, largest[:, None])
    if cells.dtype.element_ty == tl.bfloat16:
        first, second = to_bfloat16(first), to_bfloat16(second)
    # K slabs are [head_dim][block_size], V slabs [block_size][head_dim].
    stride = tl.where(is_key, block_size, 1)
    starts = cells + slabs * slab_size + offsets * tl.where(is_key, 1, head_dim)
    targets = starts[:, None] + tl.arange(0, first.shape[1])[None, :] * stride
    tl.store(targets, first, exists)
    tl.store(targets + head_dim // 2 * stride, second, exists)


@triton.jit(do_not_specialize=["table_width"])
def attend(
    heads,
    positions,
    tiles,
    block_table,
    cells,
    scales,
    outputs,
    table_width,
    softmax_scale,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    tile_tokens: tl.constexpr,
    group_width: tl.constexpr,
    head_width: tl.constexpr,
    span: tl.constexpr,
    precision: tl.constexpr,
):
    """Program [tile, kv head]: up to tile_tokens consecutive tokens of one piece, each with all query heads of the kv head's
    group, attend to their context in the cache. heads [tokens, num_heads + 2 * num_kv_heads, head_dim] float32, rotated;
    outputs [tokens, num_heads, head_dim] float32. A tile is (piece, first token, number of tokens); one without tokens is
    padding, and gives zeros.

    Paged attention (arXiv:2309.06180) with the online softmax of FlashAttention (arXiv:2205.14135): spans of positions are
    read through the block table, where they lie, from position 0 upwards; spans do not depend on the block size. A span that a
    token may not look at leaves its sums as they are, bit for bit, so a token's result is the same in each tile.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    piece = tl.load(tiles + 3 * tile).to(tl.int64)
    first_row = tl.load(tiles + 3 * tile + 1).to(tl.int64)
    num_rows = tl.load(tiles + 3 * tile + 2)
    start = tl.load(positions + first_row)
    end = tl.where(num_rows > 0, start + num_rows, 0)
    group: tl.constexpr = num_heads // num_kv_heads
    num_values: tl.constexpr = head_dim * block_size
    # In the elements of `cells`, in which one scale takes as much as four int8.
    slab_size: tl.constexpr = num_values + (4 * block_size if scales is not None else 0)

    # Rows of the tile's matrices: for each token the heads of its group.
    rows = tl.arange(0, tile_tokens * group_width)
    tokens, members = rows // group_width, rows % group_width
    columns = tl.arange(0, head_width)
    is_column = columns < head_dim
    query_heads = kv_head * group + members
    exists = ((tokens < num_rows) & (members < group))[:, None] & is_column[None, :]
    sources = heads + ((first_row + tokens) * (num_heads + 2 * num_kv_heads) + query_heads)[:, None] * head_dim
    queries = tl.load(sources + columns[None, :], exists, 0.0) * softmax_scale

    largest = tl.full((tile_tokens * group_width,), float("-inf"), tl.float32)
    totals = tl.full((tile_tokens * group_width,), 0.0, tl.float32)
    sums = tl.full((tile_tokens * group_width, head_width), 0.0, tl.float32)
    for span_start in range(0, end, span):
        context = span_start + tl.arange(0, span)
        is_context = context < end
        blocks = tl.load(block_table + piece * table_width + context // block_size, is_context, 0).to(tl.int64)
        offsets = context % block_size
        slabs = blocks * 2 * num_kv_heads + kv_head
        addresses = (slabs * slab_size + offsets)[None, :] + columns[:, None] * block_size
        keys = tl.load(cells + addresses, is_context[None, :] & is_column[:, None], 0.0)
        scores = tl.dot(queries, keys.to(tl.float32), input_precision=precision)
        if scales is not None:
            addresses = slabs * (slab_size // 4) + num_values // 4 + offsets
            scores *= tl.load(scales + addresses, is_context, 0.0)[None, :]
        scores = tl.where(context[None, :] <= (start + tokens)[:, None], scores, float("-inf"))

        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - new_largest[:, None])
        kept = tl.exp(largest - new_largest)
        totals = totals * kept + tl.sum(weights, 1)
        largest = new_largest

        slabs += num_kv_heads
        if scales is not None:
            addresses = slabs * (slab_size // 4) + num_values // 4 + offsets
            weights *= tl.load(scales + addresses, is_context, 0.0)[None, :]
        addresses = (slabs * slab_size + offsets * head_dim)[:, None] + columns[None, :]
        values = tl.load(cells + addresses, is_context[:, None] & is_column[None, :], 0.0)
        sums = tl.dot(weights, values.to(tl.float32), sums * kept[:, None], input_precision=precision)

    results = sums / tl.where(totals > 0, totals, 1.0)[:, None]
    exists = ((tokens < tl.maximum(num_rows, 1)) & (members < group))[:, None] & is_column[None, :]
    targets = outputs + ((first_row + tokens) * num_heads + query_heads)[:, None] * head_dim
    tl.store(targets + columns[None, :], results, exists)
