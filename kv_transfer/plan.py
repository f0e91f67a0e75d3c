"""Which bytes of one worker's KV cache become which bytes of another's.

The two may cut the same KV differently: into blocks of other sizes, its heads over other numbers of ranks, and store numbers in
another format. What travels is a ticket's *region*: the ticket's heads of one destination block of one layer, in the order
[2 (K, V)][heads][slab] of segue/kv_layout.py. A `RegionFormat` says how large its blocks are and which format its numbers have.
Where source, region and target are cut alike, regions are views of memory; else they are gathered, converted and scattered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kv_transfer.memory import KVMemory
from kv_transfer.pieces import Pieces, address_of, checksums, copy
from segue.errors import TransferRefused
from segue.kv_layout import DTYPE_BYTES, KVLayout
from segue.v1 import transfer_pb2 as pb

Bytes = npt.NDArray[np.uint8]
# bfloat16 as its bits: numpy does not know it.
_NUMPY_DTYPES: dict[str, type[np.generic]] = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}
_INT8_MAX = np.float32(127)


@dataclass(frozen=True, slots=True)
class RegionFormat:
    """`layout` is that of a memory which holds just `heads`, numbers among the model's KV heads."""

    layout: KVLayout
    heads: range

    @classmethod
    def of(cls, heads: range, *, head_dim: int, block_size: int, dtype: str) -> RegionFormat:
        return cls(KVLayout(1, len(heads), head_dim, block_size, dtype, ""), heads)

    @property
    def region_bytes(self) -> int:
        return self.layout.region_bytes

    def is_cut_like(self, layout: KVLayout) -> bool:
        return (layout.block_size, layout.dtype) == (self.layout.block_size, self.layout.dtype)


def format_of(layout: KVLayout, wire_dtype: str) -> pb.KVFormat:
    """What a worker tells another of how it stores its KV."""
    return pb.KVFormat(
        dtype=layout.dtype,
        block_size=layout.block_size,
        rank=layout.rank,
        num_ranks=layout.num_ranks,
        wire_dtype=wire_dtype,
    )


def peer_layout(own: KVLayout, peer: pb.KVFormat) -> KVLayout:
    """The layout of a worker that has the same KV as `own`. Raises TransferRefused for one that cannot be."""
    ranks_fit = peer.rank < peer.num_ranks and own.total_kv_heads % peer.num_ranks == 0
    if peer.dtype not in DTYPE_BYTES or not peer.block_size or not ranks_fit:
        raise TransferRefused(f"the other side's KV format makes no sense: {str(peer).strip()}")
    return replace(
        own,
        num_kv_heads=own.total_kv_heads // peer.num_ranks,
        dtype=peer.dtype,
        block_size=peer.block_size,
        rank=peer.rank,
        num_ranks=peer.num_ranks,
    )


def mismatch(prefill: pb.KVFormat, decode: pb.KVFormat) -> str:
    """Why the two cannot exchange KV; empty when they can."""
    if prefill.wire_dtype != decode.wire_dtype:
        names = [side.wire_dtype or "stored" for side in (prefill, decode)]
        return f"prefill sends KV as {names[0]}, decode wants it as {names[1]}: kv_wire must be the same on both"
    if not decode.wire_dtype and prefill.dtype != decode.dtype:
        return f"prefill stores KV as {prefill.dtype}, decode as {decode.dtype}: set kv_wire to the format to send it in"
    return ""


def shared_heads(a: KVLayout, rank: int, num_ranks: int) -> range:
    """The heads of `a` that rank `rank` of `num_ranks` holds too; empty when there are none. Raises TransferRefused when the
    heads cannot be shared out evenly."""
    if num_ranks < 1 or a.total_kv_heads % num_ranks:
        raise TransferRefused(f"{a.total_kv_heads} KV heads cannot be shared out over {num_ranks} ranks")
    share = a.total_kv_heads // num_ranks
    return range(max(a.heads.start, rank * share), min(a.heads.stop, (rank + 1) * share))


@dataclass(frozen=True, slots=True)
class SourceRegions:
    """Takes regions out of the memory of the worker that computed them."""

    memory: KVMemory
    format: RegionFormat

    def take(self, layer: int, source_blocks: Sequence[int], indices: Sequence[int]) -> list[memoryview]:
        """The prompt lies in `source_blocks`; `indices` count its blocks as the target cuts it. Gives buffers of whole regions,
        in order: views of the memory where nothing has to be converted. What lies behind the prompt's end is undefined."""
        layout = self.memory.layout
        if not self.format.is_cut_like(layout):
            return [self._converted(layer, source_blocks, indices).reshape(-1).data]
        blocks = [source_blocks[index] for index in indices]
        if self.format.heads == layout.heads:
            return [self.memory.regions(layer, blocks[start], count) for start, count in contiguous_runs(blocks)]
        return [self._gathered(layer, blocks).reshape(-1).data]

    def _gathered(self, layer: int, blocks: Sequence[int]) -> Bytes:
        """[blocks, 2, heads, slab_bytes], a copy."""
        return self.memory.blocks(layer)[np.asarray(blocks, np.intp), :, _within(self.format.heads, self.memory.layout)]

    def _converted(self, layer: int, source_blocks: Sequence[int], indices: Sequence[int]) -> Bytes:
        wanted, own = self.format.layout, self.memory.layout
        parts = []
        for start, count in contiguous_runs(indices):
            first_token = indices[start] * wanted.block_size
            end_token = first_token + count * wanted.block_size
            first_block = first_token // own.block_size
            blocks = source_blocks[first_block : own.num_blocks_for(end_token)]
            tokens = _unpack(self._gathered(layer, blocks), own)
            offset = first_token - first_block * own.block_size
            tokens = tokens.window(offset, offset + end_token - first_token).cast(own.dtype, wanted.dtype)
            parts.append(_pack(tokens, wanted))
        return np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class TargetRegions:
    """Puts regions into the memory of the worker that asked for them, and reads them there."""

    memory: KVMemory
    format: RegionFormat

    @property
    def is_direct(self) -> bool:
        """Whether regions are stored as they travel: `copy` takes them then, else `convert`."""
        return self.format.is_cut_like(self.memory.layout)

    def copy(self, layer: int, blocks: Sequence[int], payload: Sequence[memoryview]) -> list[int]:
        """`payload` holds whole regions, in the order of `blocks`. Returns their checksums."""
        size = self.format.region_bytes
        return copy(Pieces.of(payload, size), self._pieces(layer, blocks), size)

    def checksums(self, layer: int, blocks: Sequence[int]) -> list[int]:
        """Of the regions as they lie there. Only where `is_direct`."""
        return checksums(self._pieces(layer, blocks), self.format.region_bytes)

    def _pieces(self, layer: int, blocks: Sequence[int]) -> Pieces:
        """Where the regions lie, in order. Raises IndexError for blocks that are not there."""
        stored, layout = self.memory.blocks(layer), self.memory.layout
        wanted = np.asarray(blocks, np.int64)
        if ((wanted < 0) | (wanted >= len(stored))).any():
            raise IndexError(f"blocks {list(blocks)} of {len(stored)}")
        addresses = address_of(stored) + wanted * stored.strides[0]
        if self.format.heads == layout.heads:
            return Pieces(addresses, self.format.region_bytes, stored)
        # The heads' K, and behind those of other heads their V.
        first = _within(self.format.heads, layout).start * stored.strides[2]
        both = addresses[:, None] + np.array([first, first + stored.strides[1]], np.int64)
        return Pieces(both.reshape(-1), self.format.region_bytes // 2, stored)

    def convert(self, layer: int, blocks: Sequence[int], payload: Sequence[memoryview]) -> None:
        layout = self.memory.layout
        regions = np.concatenate([np.frombuffer(part, np.uint8) for part in payload])
        regions = regions.reshape(len(blocks), 2, len(self.format.heads), -1)
        tokens = _unpack(regions, self.format.layout).cast(self.format.layout.dtype, layout.dtype)
        self.memory.blocks(layer)[np.asarray(blocks, np.intp), :, _within(self.format.heads, layout)] = _pack(tokens, layout)


def contiguous_runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, length) of the stretches that count up by one."""
    start, count = 0, len(numbers)
    for position in range(1, count + 1):
        if position == count or numbers[position] != numbers[position - 1] + 1:
            yield start, position - start
            start = position


def _within(heads: range, layout: KVLayout) -> slice:
    return slice(heads.start - layout.heads.start, heads.stop - layout.heads.start)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """KV token by token: independent of how it is cut into blocks."""

    # [2 (K, V), heads, tokens, head_dim] in the stored format
    values: npt.NDArray[Any]
    # Of int8 only: [2, heads, tokens] float32
    scales: npt.NDArray[np.float32] | None

    def window(self, start: int, end: int) -> _Tokens:
        """Tokens start ... end - 1; zeros where there are none."""
        missing = max(0, end - self.values.shape[2])
        values = np.pad(self.values[:, :, start:end], ((0, 0), (0, 0), (0, missing), (0, 0)))
        scales = None if self.scales is None else np.pad(self.scales[:, :, start:end], ((0, 0), (0, 0), (0, missing)))
        return _Tokens(values, scales)

    def cast(self, source: str, target: str) -> _Tokens:
        """Rounded to nearest, ties to even, as the engine does; exact where the format stays or grows."""
        if source == target:
            return self
        numbers = self._to_float32(source)
        if target == "float32":
            return _Tokens(numbers, None)
        if target == "bfloat16":
            bits = numbers.view(np.uint32)
            return _Tokens(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16), None)
        largest = np.abs(numbers).max(-1)
        inverse = np.divide(_INT8_MAX, largest, out=np.zeros_like(largest), where=largest > 0)
        return _Tokens(np.rint(numbers * inverse[..., None]).astype(np.int8), largest / _INT8_MAX)

    def _to_float32(self, source: str) -> npt.NDArray[np.float32]:
        if source == "bfloat16":
            return (self.values.astype(np.uint32) << 16).view(np.float32)
        numbers: npt.NDArray[np.float32] = self.values.astype(np.float32)
        return numbers if self.scales is None else numbers * self.scales[..., None]


def _unpack(regions: Bytes, layout: KVLayout) -> _Tokens:
    """regions: [blocks, 2, heads, slab_bytes], contiguous."""
    num_blocks, _, num_heads, _ = regions.shape
    block_size, head_dim = layout.block_size, layout.head_dim
    numbers = regions[..., : layout.value_bytes].view(_NUMPY_DTYPES[layout.dtype])
    keys = numbers[:, 0].reshape(num_blocks, num_heads, head_dim, block_size).transpose(1, 0, 3, 2)
    values = numbers[:, 1].reshape(num_blocks, num_heads, block_size, head_dim).transpose(1, 0, 2, 3)
    both = np.stack([keys, values]).reshape(2, num_heads, num_blocks * block_size, head_dim)
    if layout.dtype != "int8":
        return _Tokens(both, None)
    scales = regions[..., layout.value_bytes :].view(np.float32)
    return _Tokens(both, scales.transpose(1, 2, 0, 3).reshape(2, num_heads, num_blocks * block_size))


def _pack(tokens: _Tokens, layout: KVLayout) -> Bytes:
    """[blocks, 2, heads, slab_bytes] of whole blocks."""
    _, num_heads, num_tokens, head_dim = tokens.values.shape
    num_blocks, block_size = num_tokens // layout.block_size, layout.block_size
    cut = tokens.values.reshape(2, num_heads, num_blocks, block_size, head_dim)
    regions = np.empty((num_blocks, 2, num_heads, layout.slab_bytes), np.uint8)
    numbers = regions[..., : layout.value_bytes]
    keys, values = cut[0].transpose(1, 0, 3, 2), cut[1].transpose(1, 0, 2, 3)
    numbers[:, 0] = np.ascontiguousarray(keys).view(np.uint8).reshape(num_blocks, num_heads, -1)
    numbers[:, 1] = np.ascontiguousarray(values).view(np.uint8).reshape(num_blocks, num_heads, -1)
    if tokens.scales is not None:
        scales = tokens.scales.reshape(2, num_heads, num_blocks, block_size).transpose(2, 0, 1, 3)
        regions[..., layout.value_bytes :] = np.ascontiguousarray(scales).view(np.uint8)
    return regions
