"""KV memory as tensors, for what works on a device's own memory. Nothing here loads torch before it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from segue.kv_layout import KVLayout

if TYPE_CHECKING:
    import torch


class TensorMemory(Protocol):
    """One worker's KV cache on whatever device it lies."""

    @property
    def layout(self) -> KVLayout: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def tensor(self) -> torch.Tensor:
        """uint8 [num_blocks * layout.block_bytes], in the order of segue/kv_layout.py."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A GPU's. No process but its own can map it: KV leaves it by torch.distributed alone."""

    layout: KVLayout
    num_blocks: int
    tensor: torch.Tensor
