"""KV memory that is not the host's, and what all kinds have in common. Nothing here loads torch before it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from kv_transfer.memory import KVMemory
from segue.errors import ConfigError
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

    @classmethod
    def allocate(cls, layout: KVLayout, num_blocks: int, device: str) -> DeviceMemory:
        """Raises ConfigError when there is no such device, or not that much memory on it."""
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device: torch finds no CUDA device; use cpu, or install a CUDA build of torch and the driver")
        num_bytes = num_blocks * layout.block_bytes
        try:
            return cls(layout, num_blocks, torch.empty(num_bytes, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            raise ConfigError(f"kv_memory: cannot get {num_bytes} bytes on {device}; give it less") from None

    def close(self) -> None:
        """It goes with the last tensor that views it."""


Memory: TypeAlias = KVMemory | DeviceMemory


def host_memory(memory: Memory) -> KVMemory:
    """Raises ConfigError when it is a device's."""
    if not isinstance(memory, KVMemory):
        raise ConfigError("kv_transport: a GPU's KV travels by dist alone")
    return memory
