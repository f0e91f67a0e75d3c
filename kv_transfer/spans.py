"""Copies memory and checksums it, without the interpreter's lock: in one pass where csrc/spans.cpp was built, else in two.

Both ways give the same checksums, XXH3 with 64 bits, so that workers with and without a compiler understand each other. Memory
is given as buffers that are read or written one after the other: regions of equal size fill them, and may cross from one to the
next.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
import xxhash

LIBRARY_MODULE = "kv_transfer._native"
# The library takes stripes of this many bytes, and regions that are longer than XXH3's short inputs.
_STRIPE_BYTES = 64
_SHORT_BYTES = 240
# (source, target), equally long; without a target the source is only read.
Span = tuple[memoryview, memoryview | None]


def checksums(sources: Sequence[memoryview], region_bytes: int) -> list[int]:
    """One for each region."""
    return take_spans([(source, None) for source in sources], region_bytes)


def copy(sources: Sequence[memoryview], targets: Sequence[memoryview], region_bytes: int) -> list[int]:
    """The checksums of what was copied. Raises ValueError when there is not as much of both."""
    return take_spans(list(_paired(sources, targets)), region_bytes)


def take_spans(spans: Sequence[Span], region_bytes: int) -> list[int]:
    """Raises ValueError for spans that are no whole number of regions."""
    num_regions, rest = divmod(sum(source.nbytes for source, _ in spans), region_bytes)
    if rest:
        raise ValueError(f"{rest} bytes are left over behind {num_regions} regions of {region_bytes}")
    library = _built_library()
    in_stripes = all(source.nbytes % _STRIPE_BYTES == 0 for source, _ in spans) and region_bytes % _STRIPE_BYTES == 0
    if library is None or not in_stripes or region_bytes <= _SHORT_BYTES:
        return _take_in_two_passes(spans, region_bytes)
    # [spans, 3 (address of source, of target, bytes)], struct Span of csrc/spans.cpp
    table = np.array([(_address(source), _address(target), source.nbytes) for source, target in spans], np.int64)
    found = np.empty(num_regions, np.uint64)
    library.segue_take_spans(table.ctypes.data, len(table), region_bytes, found.ctypes.data)
    numbers: list[int] = found.tolist()
    return numbers


def _take_in_two_passes(spans: Sequence[Span], region_bytes: int) -> list[int]:
    found = []
    running, left = xxhash.xxh3_64(), region_bytes
    for source, target in spans:
        start = 0
        while start < source.nbytes:
            end = min(start + left, source.nbytes)
            running.update(source[start:end])
            left, start = left - (end - start), end
            if left == 0:
                found.append(running.intdigest())
                running, left = xxhash.xxh3_64(), region_bytes
        if target is not None:
            np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
    return found


def _paired(sources: Sequence[memoryview], targets: Sequence[memoryview]) -> Iterator[Span]:
    """Cuts both where either is cut."""
    if (wanted := sum(source.nbytes for source in sources)) != (given := sum(target.nbytes for target in targets)):
        raise ValueError(f"{wanted} bytes do not fit into {given}")
    remaining = iter(targets)
    target = next(remaining, memoryview(b""))
    for source in sources:
        while source.nbytes:
            if not target.nbytes:
                target = next(remaining)
            size = min(source.nbytes, target.nbytes)
            yield source[:size], target[:size]
            source, target = source[size:], target[size:]


def _address(buffer: memoryview | None) -> int:
    return 0 if buffer is None else int(np.frombuffer(buffer, np.uint8).__array_interface__["data"][0])


@cache
def _built_library() -> ctypes.CDLL | None:
    """The library that was built with this package; None where that was not possible."""
    spec = importlib.util.find_spec(LIBRARY_MODULE)
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    library.segue_take_spans.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    library.segue_take_spans.restype = None
    return library
