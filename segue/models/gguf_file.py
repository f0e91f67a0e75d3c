"""Strict reading of GGUF files: metadata, the list of tensors, and their values as float32.

The header is parsed here and not with gguf.GGUFReader, because that one takes a truncated or garbled header for a shorter one;
block formats and dequantization are the `gguf` package's. Everything is checked against the file's size before it is used, so a
damaged file ends in a ModelFileError that says where, and can never make us allocate what it claims.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from segue.errors import ModelFileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# Values of one tensor that are dequantized at a time; bounds the memory that an import needs.
CHUNK_VALUES = 2**22

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

Value = bool | int | float | str | list[Any]
ValueT = TypeVar("ValueT", bool, int, float, str, list[Any])
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """`shape` is in row-major order (rows first), as numpy and torch write it; `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    block_format: GGMLQuantizationType
    offset: int
    num_bytes: int


class GgufFile:
    """One GGUF file, checked when it is opened: ModelFileError names what is wrong with it.

    Invariant: every tensor's bytes lie within the file and its block format can be dequantized.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes: npt.NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise ModelFileError(f"cannot read {path}: {error.strerror or error}") from None
        except ValueError:
            raise self.error("the file is empty; download it again") from None
        header = _HeaderReader(self)
        self.metadata: Mapping[str, Value] = header.metadata
        self.tensors: Mapping[str, TensorInfo] = header.tensors

    def error(self, problem: str, field: str | None = None) -> ModelFileError:
        return ModelFileError(f"{self.path}: {problem}", field=field)

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        """All bytes of the file, [size], mapped read-only."""
        return self._bytes

    def require(self, key: str, kind: type[ValueT]) -> ValueT:
        """Raises ModelFileError when `key` is missing or not of `kind` (a whole number is also a float)."""
        if key not in self.metadata:
            raise self.error(f"the metadata key {key} is missing", field=key)
        value = self.metadata[key]
        if kind is float and type(value) is int:
            return kind(value)
        if type(value) is not kind:
            raise self.error(f"the metadata key {key} must be of type {kind.__name__}, not {_shown(value)}", field=key)
        return value

    def optional(self, key: str, kind: type[ValueT], default: ValueT) -> ValueT:
        return self.require(key, kind) if key in self.metadata else default

    def read_chunks(self, tensor: TensorInfo, row_order: npt.NDArray[np.intp] | None = None) -> Iterator[Float32]:
        """The tensor's values, a number of whole rows at a time, float32 [rows, row length]; a vector is a column of rows.

        `row_order` [rows] says which stored row comes at each place. Raises ModelFileError on a value that is not finite.
        """
        block_values, block_bytes = GGML_QUANT_SIZES[tensor.block_format]
        row_length = tensor.shape[-1] if len(tensor.shape) > 1 or block_values > 1 else 1
        num_rows = math.prod(tensor.shape) // row_length
        stored = self._bytes[tensor.offset : tensor.offset + tensor.num_bytes]
        rows = stored.reshape(num_rows, row_length // block_values * block_bytes)
        step = max(1, CHUNK_VALUES // row_length)
        for start in range(0, num_rows, step):
            stop = start + step
            chunk = np.ascontiguousarray(rows[start:stop] if row_order is None else rows[row_order[start:stop]])
            with np.errstate(all="ignore"):
                values = dequantize(chunk, tensor.block_format)
            if not np.isfinite(values).all():
                raise self.error(f"the tensor {tensor.name} holds values that are not finite; the file is damaged")
            yield np.asarray(values, dtype=np.float32)


class _HeaderReader:
    """Reads the header from front to back; `self._at` is the position of the next byte."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._view = memoryview(file.data.data)
        self._at = 0
        self._reading = "its first bytes"
        num_tensors, num_keys = self._read_preamble()
        self.metadata = self._read_metadata(num_keys)
        self.tensors = self._read_tensors(num_tensors)

    def _read_preamble(self) -> tuple[int, int]:
        magic = bytes(self._take(4))
        if magic != MAGIC:
            raise self._file.error(f"not a GGUF file: it begins with {magic!r}; give a .gguf file or a model's directory")
        (version,) = self._unpack("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "a big-endian file" if swapped in VERSIONS else f"GGUF version {version}"
            raise self._file.error(f"{kind} is not supported, only little-endian versions {VERSIONS}")
        num_tensors, num_keys = self._unpack("QQ")
        return num_tensors, num_keys

    def _read_metadata(self, num_keys: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for index in range(num_keys):
            self._reading = f"metadata key {index + 1} of {num_keys}"
            key = self._read_string()
            self._reading = f"the metadata key {key[:80]}"
            if key in metadata:
                raise self._file.error(f"{self._reading} stands twice", field=key)
            (kind,) = self._unpack("I")
            metadata[key] = self._read_value(kind)
        return metadata

    def _read_value(self, kind: int) -> Value:
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])[0]  # type: ignore[no-any-return]
        if kind == _STRING:
            return self._read_string()
        if kind != _ARRAY:
            raise self._file.error(f"{self._reading} has an unknown type {kind}; the file is damaged")
        item_kind, length = self._unpack("IQ")
        if item_kind in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[item_kind])
            return list(struct.unpack(f"<{length}{_SCALARS[item_kind]}", self._take(length * size)))
        if item_kind != _STRING:
            raise self._file.error(f"{self._reading} is a list of the unsupported type {item_kind}")
        return [self._read_string() for _ in range(length)]

    def _read_tensors(self, num_tensors: int) -> dict[str, TensorInfo]:
        found = []
        for index in range(num_tensors):
            self._reading = f"tensor {index + 1} of {num_tensors}"
            name = self._read_string()
            self._reading = f"the tensor {name[:80]}"
            (num_dims,) = self._unpack("I")
            if not 1 <= num_dims <= 4:
                raise self._file.error(f"{self._reading} has {num_dims} dimensions; the file is damaged")
            # GGUF names the fastest dimension first.
            shape = tuple(reversed(self._unpack(f"{num_dims}Q")))
            kind, offset = self._unpack("IQ")
            found.append((name, shape, kind, offset))
        alignment = self._file_alignment()
        start = -(-self._at // alignment) * alignment
        tensors = {name: self._tensor_info(name, shape, kind, start + offset) for name, shape, kind, offset in found}
        if len(tensors) != num_tensors:
            raise self._file.error("two tensors have the same name; the file is damaged")
        return tensors

    def _file_alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._file.error(f"general.alignment must be a power of two, not {_shown(alignment)}")
        return alignment

    def _tensor_info(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        try:
            block_format = GGMLQuantizationType(kind)
        except ValueError:
            raise self._file.error(f"the tensor {name} has the unknown block format {kind}") from None
        block_values, block_bytes = GGML_QUANT_SIZES[block_format]
        try:
            dequantize(np.zeros((1, block_bytes), dtype=np.uint8), block_format)
        except NotImplementedError:
            raise self._file.error(
                f"the tensor {name} has the block format {block_format.name}, which is unsupported"
            ) from None
        if shape[-1] % block_values or 0 in shape:
            raise self._file.error(f"the tensor {name} has the shape {shape}, impossible in {block_format.name}")
        num_bytes = math.prod(shape) // block_values * block_bytes
        if offset + num_bytes > len(self._view):
            raise self._file.error(
                f"truncated: the tensor {name} ends at byte {offset + num_bytes}, the file at {len(self._view)}; "
                "download it again"
            )
        return TensorInfo(name, shape, block_format, offset, num_bytes)

    def _read_string(self) -> str:
        (length,) = self._unpack("Q")
        try:
            return bytes(self._take(length)).decode()
        except UnicodeDecodeError:
            raise self._file.error(f"{self._reading} holds text that is not UTF-8; the file is damaged") from None

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self._take(struct.calcsize("<" + layout)))

    def _take(self, num_bytes: int) -> memoryview:
        end = self._at + num_bytes
        if end > len(self._view):
            raise self._file.error(
                f"truncated or damaged: {self._reading} would end at byte {end}, the file ends at {len(self._view)}; "
                "download it again"
            )
        taken = self._view[self._at : end]
        self._at = end
        return taken


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
