"""The safetensors format: 8 bytes of header length, a JSON header, then the tensors' bytes.

Writing here and not with safetensors.numpy.save_file keeps one chunk of one tensor in memory instead of the whole model.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from segue.errors import ModelFileError

_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
# The format's own limit.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """`names` are the tensors' names; `data_start` is the position of the first tensor's first byte."""

    names: frozenset[str]
    data_start: int


class Float32Writer:
    """Writes float32 tensors whose names and shapes are known beforehand, one after the other, in that order.

    Leaving the block without an error checks that all of them were written in full.
    """

    def __init__(self, path: Path, tensors: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        self._path = path
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in tensors:
            end = offset + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        # Spaces fill up to a multiple of 8, so that the tensors are aligned.
        self._header = text + b" " * (-len(text) % 8)
        self.num_bytes = 8 + len(self._header) + offset

    def __enter__(self) -> Self:
        self._file = self._path.open("xb")
        self._file.write(struct.pack("<Q", len(self._header)) + self._header)
        return self

    def write(self, chunks: Iterable[npt.NDArray[np.float32]]) -> None:
        for chunk in chunks:
            self._file.write(chunk.astype("<f4", copy=False).tobytes())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        written = self._file.tell()
        self._file.close()
        if error is None and written != self.num_bytes:
            raise ModelFileError(f"{self._path}: {written} bytes were written where {self.num_bytes} were announced")


def read_header(path: Path) -> SafetensorsHeader:
    """Reads and checks the header against the file's length. Raises ModelFileError saying what is wrong with `path`."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            text = file.read(length) if 2 <= length <= min(size, _MAX_HEADER_BYTES) else b""
    except OSError as error:
        raise ModelFileError(f"cannot read {path}: {error.strerror}") from None
    if len(text) != length or not text:
        raise ModelFileError(f"{path}: not a safetensors file, or cut off within its header; fetch it again")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ModelFileError(f"{path}: its header is not valid JSON; fetch it again")
    header.pop("__metadata__", None)
    data_end = max((_end_of(path, name, entry) for name, entry in header.items()), default=0)
    if 8 + length + data_end != size:
        raise ModelFileError(f"{path}: {size} bytes long where its header says {8 + length + data_end}; fetch it again")
    return SafetensorsHeader(frozenset(header), 8 + length)


def _end_of(path: Path, name: str, entry: object) -> int:
    """Where the tensor's bytes end, relative to the first tensor."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if dtype in _ITEM_BYTES:
            sound = begin >= 0 and all(type(size) is int and size >= 0 for size in shape)
            if sound and end - begin == math.prod(shape) * _ITEM_BYTES[dtype]:
                return end
    raise ModelFileError(f"{path}: the header's entry of the tensor {name[:80]} is wrong; fetch the file again")
