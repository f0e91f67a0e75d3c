"""Copies memory and checksums it, without the interpreter's lock: in one pass where csrc/pieces.cpp was built, else in two.

Both ways give the same checksums, XXH3 with 64 bits, so that workers with and without a compiler understand each other. One
call takes many regions, since a call for each would cost more than their bytes.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import xxhash

LIBRARY_MODULE = "kv_transfer._native"
# The library takes stripes of this many bytes, and regions that are longer than XXH3's short inputs.
_STRIPE_BYTES = 64
_SHORT_BYTES = 240


@dataclass(frozen=True, slots=True)
class Pieces:
    """Memory that is read or written piece by piece, all of one size. A region is one piece or several in a row."""

    # int64 [pieces]
    addresses: npt.NDArray[np.int64]
    piece_bytes: int
    # Keeps the memory from going away.
    owner: object

    @classmethod
    def of(cls, buffers: Sequence[memoryview], piece_bytes: int) -> Pieces:
        """Raises ValueError for a buffer that holds no whole number of pieces."""
        arrays = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
        if any(array.nbytes % piece_bytes for array in arrays):
            raise ValueError(f"{[array.nbytes for array in arrays]} bytes are not all in pieces of {piece_bytes}")
        offsets = [address_of(array) + np.arange(0, array.nbytes, piece_bytes, dtype=np.int64) for array in arrays]
        return cls(np.concatenate([np.empty(0, np.int64), *offsets]), piece_bytes, arrays)

    @property
    def num_bytes(self) -> int:
        return len(self.addresses) * self.piece_bytes

    def cut(self, piece_bytes: int) -> Pieces:
        """The same memory in smaller pieces, of a size that divides this one's."""
        if piece_bytes == self.piece_bytes:
            return self
        inner = np.arange(0, self.piece_bytes, piece_bytes, dtype=np.int64)
        return Pieces((self.addresses[:, None] + inner).reshape(-1), piece_bytes, self.owner)


def checksums(sources: Pieces, region_bytes: int) -> list[int]:
    """One for each region."""
    return _take(sources, None, region_bytes)


def copy(sources: Pieces, targets: Pieces, region_bytes: int) -> list[int]:
    """The checksums of what was copied. The larger pieces' size is a multiple of the smaller ones'. Raises ValueError when
    there is not as much of both."""
    if sources.num_bytes != targets.num_bytes:
        raise ValueError(f"{sources.num_bytes} bytes do not fit into {targets.num_bytes}")
    piece_bytes = min(sources.piece_bytes, targets.piece_bytes)
    return _take(sources.cut(piece_bytes), targets.cut(piece_bytes), region_bytes)


def address_of(array: npt.NDArray[np.uint8]) -> int:
    return int(array.__array_interface__["data"][0])


def _take(sources: Pieces, targets: Pieces | None, region_bytes: int) -> list[int]:
    num_regions, rest = divmod(sources.num_bytes, region_bytes)
    if rest:
        raise ValueError(f"{rest} bytes are left over behind {num_regions} regions of {region_bytes}")
    library, piece_bytes = _built_library(), sources.piece_bytes
    if library is None or piece_bytes % _STRIPE_BYTES or region_bytes % _STRIPE_BYTES or region_bytes <= _SHORT_BYTES:
        return _take_in_two_passes(sources, targets, region_bytes)
    found = np.empty(num_regions, np.uint64)
    written = None if targets is None else targets.addresses.ctypes.data
    read, num_pieces = sources.addresses.ctypes.data, len(sources.addresses)
    library.segue_take_pieces(read, written, num_pieces, piece_bytes, region_bytes, found.ctypes.data)
    numbers: list[int] = found.tolist()
    return numbers


def _take_in_two_passes(sources: Pieces, targets: Pieces | None, region_bytes: int) -> list[int]:
    found = []
    pieces_per_region = region_bytes // sources.piece_bytes
    for region in sources.addresses.reshape(-1, pieces_per_region):
        running = xxhash.xxh3_64()
        for address in region:
            running.update(_memory_at(address, sources.piece_bytes).data)
        found.append(running.intdigest())
    if targets is not None:
        for source, target in zip(sources.addresses, targets.addresses, strict=True):
            np.copyto(_memory_at(target, targets.piece_bytes), _memory_at(source, sources.piece_bytes))
    return found


def _memory_at(address: np.int64, num_bytes: int) -> npt.NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(int(address)))


@cache
def _built_library() -> ctypes.CDLL | None:
    """The library that was built with this package; None where that was not possible."""
    spec = importlib.util.find_spec(LIBRARY_MODULE)
    return None if spec is None or spec.origin is None else open_library(spec.origin)


def open_library(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.segue_take_pieces.argtypes = (pointer, pointer, number, number, number, pointer)
    library.segue_take_pieces.restype = None
    return library
