"""A worker's KV memory as tensors. The memory itself may be shared with the workers that write into it."""

from __future__ import annotations

from mmap import mmap

import torch

from segue.errors import InternalError
from segue.kv_layout import KVLayout

WritableBuffer = memoryview | mmap | bytearray
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class KVCache:
    """Views of one memory laid out as segue.kv_layout says, one for each layer."""

    def __init__(self, memory: torch.Tensor, layout: KVLayout, num_blocks: int) -> None:
        """`memory` [num_blocks * layout.block_bytes] uint8 lives on the device that computes."""
        if memory.numel() != num_blocks * layout.block_bytes:
            raise InternalError(f"{num_blocks} KV blocks need {num_blocks * layout.block_bytes} bytes, not {memory.numel()}")
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = memory.device
        # For each layer [num_blocks, 2, num_kv_heads, slab_bytes] uint8
        self.layers = list(memory.view(layout.num_layers, num_blocks, 2, layout.num_kv_heads, layout.slab_bytes))

    @classmethod
    def over(cls, buffer: WritableBuffer, layout: KVLayout, num_blocks: int) -> KVCache:
        """`buffer` is writable, in host memory, and must outlive the cache."""
        return cls(torch.frombuffer(buffer, dtype=torch.uint8), layout, num_blocks)

    def keys(self, layer: int) -> torch.Tensor:
        """[num_blocks, num_kv_heads, head_dim, block_size] in the layout's dtype."""
        return self._numbers(layer, 0).view(self.num_blocks, -1, self.layout.head_dim, self.layout.block_size)

    def values(self, layer: int) -> torch.Tensor:
        """[num_blocks, num_kv_heads, block_size, head_dim] in the layout's dtype."""
        return self._numbers(layer, 1).view(self.num_blocks, -1, self.layout.block_size, self.layout.head_dim)

    def scales(self, layer: int) -> torch.Tensor:
        """Of int8 caches only: [num_blocks, 2, num_kv_heads, block_size] float32."""
        scales: torch.Tensor = self.layers[layer][..., self._value_bytes :].view(torch.float32)
        return scales

    def _numbers(self, layer: int, kv: int) -> torch.Tensor:
        """K (0) or V (1) without scales: [num_blocks, num_kv_heads, head_dim * block_size]"""
        numbers: torch.Tensor = self.layers[layer][:, kv, :, : self._value_bytes].view(TORCH_DTYPES[self.layout.dtype])
        return numbers

    @property
    def _value_bytes(self) -> int:
        return self.layout.head_dim * self.layout.block_size * TORCH_DTYPES[self.layout.dtype].itemsize
