"""How KV cache lies in memory. Two workers may exchange blocks only when their layouts have the same fingerprint.

Memory of one worker:  [num_layers][num_blocks][2 (K, V)][num_kv_heads][block_size][head_dim]
A *region* is one block of one layer: contiguous, `region_bytes` long. Within it the slice of one head is contiguous.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class KVLayout:
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    # Stands for the weights: KV from other weights is other KV.
    model_revision: str

    @property
    def region_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        return self.num_layers * self.region_bytes

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def fingerprint(self) -> str:
        text = ";".join(f"{name}={value}" for name, value in asdict(self).items())
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
