"""What bench.transfer moves: all of a small KV cache, whose layout both processes know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kv_transfer.memory import KVMemory
from segue.kv_layout import KVLayout

# 2 (K, V) x 4 heads x 64 numbers x 32 tokens x 4 bytes.
REGION_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Case:
    layout: KVLayout
    num_blocks: int

    @classmethod
    def of_size(cls, num_layers: int, num_blocks: int) -> Case:
        return cls(KVLayout(num_layers, 4, 64, 32, "float32", "bench"), num_blocks)

    @property
    def num_bytes(self) -> int:
        return self.layout.block_bytes * self.num_blocks

    def allocate(self) -> KVMemory:
        return KVMemory.allocate(self.layout, self.num_blocks)

    def content(self) -> npt.NDArray[np.uint8]:
        """uint8 [num_bytes], what the writer's memory holds: random, and the same in both processes."""
        return np.random.default_rng(self.num_bytes).integers(0, 256, self.num_bytes, np.uint8)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Case:
        return cls(KVLayout(**fields["layout"]), fields["num_blocks"])


SIZES = {
    "64KiB": Case.of_size(1, 1),
    "1MiB": Case.of_size(4, 4),
    "16MiB": Case.of_size(8, 32),
    "64MiB": Case.of_size(16, 64),
}
