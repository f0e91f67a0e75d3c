"""A worker's KV memory as tensors. The memory itself may be shared with the workers that write into it."""

from __future__ import annotations

from mmap import mmap

import torch

from segue.errors import InternalError
from segue.kv_layout import KVLayout

WritableBuffer = memoryview | mmap | bytearray
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class KVCache:
    """Views of [num_layers][num_blocks][2][num_kv_heads][block_size][head_dim], each a plain two-dimensional table.

    A *slab* is the K or V of one head of one block: row (block * 2 + kv) * num_kv_heads + head of `slabs`.
    A *slot* is the K or V of one head of one token: row slab * block_size + offset of `slots`.
    """

    def __init__(self, buffer: WritableBuffer, layout: KVLayout, num_blocks: int) -> None:
        """`buffer` is writable and holds num_blocks * layout.block_bytes bytes; it must outlive the cache."""
        num_bytes = memoryview(buffer).nbytes
        if num_bytes != num_blocks * layout.block_bytes:
            raise InternalError(f"{num_blocks} KV blocks need {num_blocks * layout.block_bytes} bytes, not {num_bytes}")
        dtype = TORCH_DTYPES[layout.dtype]
        memory = torch.frombuffer(buffer, dtype=dtype).view(layout.num_layers, -1)
        # For each layer: [num_blocks * 2 * num_kv_heads, block_size * head_dim]
        self.slabs = [layer.view(-1, layout.block_size * layout.head_dim) for layer in memory]
        # For each layer: [num_blocks * 2 * num_kv_heads * block_size, head_dim]
        self.slots = [layer.view(-1, layout.head_dim) for layer in memory]
        self.dtype = dtype
