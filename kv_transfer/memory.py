"""The KV cache's memory: one anonymous shared-memory file, so that a worker on the same host can write into it.

The file is a memfd. It has no name in any file system and goes with the last process that has it open or mapped, however that
process ends. A peer opens it through /proc/<pid>/fd/<fd>. Its size is sealed: nobody can cut the memory from under another.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from segue.errors import ConfigError, TransferError
from segue.kv_layout import KVLayout
from segue.v1 import transfer_pb2 as pb

if TYPE_CHECKING:
    import torch

_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class KVMemory:
    """`num_blocks` blocks of `layout`, this process's own or mapped from another. See segue/kv_layout.py for their order.

    `buffer` is all of it, writable. A tensor that views it keeps the mapping alive even after `close`.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, fd: int, name: str) -> None:
        """Takes `fd` over. Use `allocate` or `open`."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.num_bytes = layout.block_bytes * num_blocks
        self._fd = fd
        self._name = name
        self._mapping = mmap.mmap(fd, self.num_bytes, mmap.MAP_SHARED)
        self.buffer = memoryview(self._mapping)
        # uint8 [num_bytes]
        self._array: npt.NDArray[np.uint8] = np.frombuffer(self._mapping, np.uint8)

    @classmethod
    def allocate(cls, layout: KVLayout, num_blocks: int) -> Self:
        """New zeroed memory, every page present. Raises ConfigError when the host has not that much."""
        if num_blocks < 1:
            raise ConfigError(f"kv_memory: has room for {num_blocks} blocks of {layout.block_bytes} bytes; give it more")
        name = f"segue-kv-{secrets.token_hex(8)}"
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        num_bytes = layout.block_bytes * num_blocks
        try:
            os.ftruncate(fd, num_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
            memory = cls(layout, num_blocks, fd, name)
        except OSError as error:
            os.close(fd)
            raise ConfigError(f"kv_memory: cannot get {num_bytes} bytes: {error.strerror}; give it less") from None
        try:
            if not memory._populate(_MADV_POPULATE_WRITE):
                memory._array[:: mmap.PAGESIZE] = 0
        except OSError as error:
            memory.close()
            raise ConfigError(f"kv_memory: cannot get {num_bytes} bytes: {error.strerror}; give it less") from None
        return memory

    @classmethod
    def open(cls, layout: KVLayout, segment: pb.SharedSegment) -> Self:
        """The memory of another process, for writing. Raises TransferError when it cannot be opened or is something else."""
        path = _path_of(segment)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TransferError(f"cannot open the peer's KV memory: {error.strerror}") from None
        try:
            if os.readlink(f"/proc/self/fd/{fd}") != _link_of(segment):
                raise TransferError(f"{path} is not the peer's KV memory")
            expected = layout.block_bytes * segment.num_blocks
            if not expected == segment.num_bytes == os.fstat(fd).st_size:
                raise TransferError(f"the peer's KV memory has {segment.num_bytes} bytes, its layout needs {expected}")
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SIZE_SEALS != _SIZE_SEALS:
                raise TransferError("the peer's KV memory could change its size")
            memory = cls(layout, segment.num_blocks, fd, segment.name)
        except OSError as error:
            os.close(fd)
            raise TransferError(f"cannot map the peer's KV memory: {error.strerror}") from None
        except TransferError:
            os.close(fd)
            raise
        with contextlib.suppress(OSError):
            # Only spares page faults later; the peer's bytes must not be touched.
            memory._populate(_MADV_POPULATE_READ)
        return memory

    @property
    def segment(self) -> pb.SharedSegment:
        return pb.SharedSegment(
            pid=os.getpid(), fd=self._fd, num_bytes=self.num_bytes, num_blocks=self.num_blocks, name=self._name
        )

    @property
    def tensor(self) -> torch.Tensor:
        """uint8 [num_bytes], a view."""
        import torch

        return torch.frombuffer(self.buffer, dtype=torch.uint8)

    def region(self, layer: int, block: int) -> memoryview:
        """One block of one layer, `layout.region_bytes` long."""
        return self.regions(layer, block, 1)

    def regions(self, layer: int, first_block: int, count: int) -> memoryview:
        """`count` neighbouring blocks of one layer, which lie one after the other."""
        start, end = self._bounds(layer, first_block, count)
        return self.buffer[start:end]

    def blocks(self, layer: int) -> npt.NDArray[np.uint8]:
        """All blocks of one layer: [num_blocks, 2, num_kv_heads, slab_bytes]"""
        start, end = self._bounds(layer, 0, self.num_blocks)
        return self._array[start:end].reshape(self.num_blocks, 2, self.layout.num_kv_heads, -1)

    def close(self) -> None:
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        self._array = np.empty(0, np.uint8)
        # Tensors and messages on their way may still view the memory; it then goes with the last of them.
        with contextlib.suppress(BufferError):
            self.buffer.release()
            self._mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _bounds(self, layer: int, first_block: int, count: int) -> tuple[int, int]:
        if not 0 <= layer < self.layout.num_layers:
            raise IndexError(f"layer {layer} of {self.layout.num_layers}")
        if first_block < 0 or count < 0 or first_block + count > self.num_blocks:
            raise IndexError(f"blocks {first_block} to {first_block + count - 1} of {self.num_blocks}")
        size = self.layout.region_bytes
        start = (layer * self.num_blocks + first_block) * size
        return start, start + count * size

    def _populate(self, advice: int) -> bool:
        """Makes all pages present; False when this kernel (before 5.14) does not know how."""
        try:
            self._mapping.madvise(advice)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        return True


def is_open_at_owner(segment: pb.SharedSegment) -> bool:
    """Whether the process whose memory this is lives and has it open."""
    try:
        return os.readlink(_path_of(segment)) == _link_of(segment)
    except OSError:
        return False


def _path_of(segment: pb.SharedSegment) -> str:
    return f"/proc/{segment.pid}/fd/{segment.fd}"


def _link_of(segment: pb.SharedSegment) -> str:
    return f"/memfd:{segment.name} (deleted)"
