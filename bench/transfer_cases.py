"""What bench.transfer moves: KV of so many bytes, in regions of 64 KiB, the same on both sides of a hand-over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kv_transfer.memory import KVMemory
from segue.kv_layout import KVLayout

REGION_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    num_layers: int
    num_blocks: int

    @property
    def num_bytes(self) -> int:
        return self.num_layers * self.num_blocks * REGION_BYTES

    @property
    def layout(self) -> KVLayout:
        return KVLayout(self.num_layers, 4, 64, 32, "float32", "bench")

    def allocate(self) -> KVMemory:
        return KVMemory.allocate(self.layout, self.num_blocks)

    def content(self) -> npt.NDArray[np.uint8]:
        """What the writer's memory holds: random, and the same in both processes."""
        return np.random.default_rng(self.num_bytes).integers(0, 256, self.num_bytes, np.uint8)


CASES = {case.name: case for case in (Case("64KiB", 1, 1), Case("1MiB", 4, 4), Case("16MiB", 8, 32), Case("64MiB", 16, 64))}
