"""How KV cache lies in memory. Two workers may exchange KV only when their layouts have the same fingerprint: it is then the
same KV, perhaps cut into other blocks, spread over other ranks, or stored in another number format.

Memory of one rank:  [num_layers][num_blocks][2 (K, V)][num_kv_heads][slab]
A *slab* is the K or V of one head of one block, and contiguous, as is a *region*: one block of one layer.
    K slab  [head_dim][block_size]   transposed, so that a query meets all positions of a block at once
    V slab  [block_size][head_dim]
In int8, [block_size] float32 scales follow the slab's values: one for each token.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class KVLayout:
    num_layers: int
    # Held in this memory: the model's, or a tensor-parallel rank's share of them.
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    # Stands for the weights: KV from other weights is other KV.
    model_revision: str
    # Formats in which prefill and decode workers hold the weights: KV computed in other formats has other bits.
    weights: str = "float32"
    # Of the tensor-parallel ranks that share the model's heads out evenly, in order.
    rank: int = 0
    num_ranks: int = 1

    @property
    def total_kv_heads(self) -> int:
        return self.num_kv_heads * self.num_ranks

    @property
    def heads(self) -> range:
        """Which of the model's KV heads lie in this memory."""
        return range(self.rank * self.num_kv_heads, (self.rank + 1) * self.num_kv_heads)

    @property
    def value_bytes(self) -> int:
        """Of one slab, without scales."""
        return self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def slab_bytes(self) -> int:
        return self.value_bytes + (self.block_size * SCALE_BYTES if self.dtype == "int8" else 0)

    @property
    def region_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.slab_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_layers * self.region_bytes

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def fingerprint(self) -> str:
        """Equal for all layouts of the same KV, however it is cut or stored."""
        same = (self.num_layers, self.total_kv_heads, self.head_dim, self.model_revision, self.weights)
        return hashlib.blake2b(";".join(map(str, same)).encode(), digest_size=16).hexdigest()
