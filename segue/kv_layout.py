"""How KV cache lies in memory. Two workers may exchange blocks only when their layouts have the same fingerprint.

Memory of one worker:  [num_layers][num_blocks][2 (K, V)][num_kv_heads][slab]
A *slab* is the K or V of one head of one block, and contiguous, as is a *region*: one block of one layer.
    K slab  [head_dim][block_size]   transposed, so that a query meets all positions of a block at once
    V slab  [block_size][head_dim]
In int8, [block_size] float32 scales follow the slab's values: one for each token.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class KVLayout:
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    # Stands for the weights: KV from other weights is other KV.
    model_revision: str
    # Formats in which prefill and decode workers hold the weights: KV computed in other formats has other bits.
    weights: str = "float32"

    @property
    def slab_bytes(self) -> int:
        values = self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]
        return values + (self.block_size * SCALE_BYTES if self.dtype == "int8" else 0)

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
        text = ";".join(f"{name}={value}" for name, value in asdict(self).items())
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
