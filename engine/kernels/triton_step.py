"""What the GPU backend's kernels read of a step: made on the host, moved to the device as one array."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from engine.step import StepInputs
from segue.kv_layout import KVLayout

# Bytes to which the parts of a step are aligned: Triton compiles a kernel anew for pointers that are not.
_ALIGNMENT = 16

Int32Array: TypeAlias = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TritonStep:
    """All int32 and on the device. Rows are tokens, then padding."""

    # [1]
    num_tokens: torch.Tensor
    # [rows]
    positions: torch.Tensor
    # The piece that each row belongs to. [rows]
    pieces: torch.Tensor
    # Piece, first row and number of rows of each tile of queries, none in a padding tile: tiles of one row, for chunks of one
    # token, then those of longer chunks. [tiles, 3]
    decode_tiles: torch.Tensor
    prefill_tiles: torch.Tensor
    # Blocks of each piece, then zeros. [pieces, table width]
    block_table: torch.Tensor

    def refill(self, fresh: TritonStep) -> None:
        """Writes a step of chunks of one token into a padded step's tensors; rows that are left over become padding."""
        num_pieces, table_width = fresh.block_table.shape
        self.num_tokens.copy_(fresh.num_tokens)
        self.positions[:num_pieces].copy_(fresh.positions)
        self.decode_tiles[:num_pieces].copy_(fresh.decode_tiles)
        self.decode_tiles[num_pieces:, 2] = 0
        self.block_table[:num_pieces, :table_width].copy_(fresh.block_table)


def prepare(step: StepInputs, layout: KVLayout, tile_tokens: int, device: torch.device) -> TritonStep:
    """`tile_tokens`: tokens in a tile of a chunk of several."""
    pieces, num_decoding = step.pieces, step.num_decoding
    num_blocks = [layout.num_blocks_for(piece.end) for piece in pieces]
    block_table = np.zeros((len(pieces), max(num_blocks, default=0)), np.int32)
    for row, piece, count in zip(block_table, pieces, num_blocks, strict=True):
        row[:count] = piece.lease.block_ids[:count]
    prefill_tiles = [
        (index, piece.first_row + first, min(tile_tokens, piece.num_rows - first))
        for index, piece in enumerate(pieces[num_decoding:], num_decoding)
        for first in range(0, piece.num_rows, tile_tokens)
    ]
    parts = [
        np.array([len(step.positions)], np.int32),
        step.positions.numpy().astype(np.int32),
        np.repeat(np.arange(len(pieces), dtype=np.int32), [piece.num_rows for piece in pieces]),
        _decode_tiles(num_decoding),
        np.array(prefill_tiles, np.int32).reshape(-1, 3),
        block_table,
    ]
    return TritonStep(*_to_device(parts, device))


def padded_step(num_rows: int, table_width: int, device: torch.device) -> TritonStep:
    """Padding only: tensors that `refill` fills with up to `num_rows` chunks of one token."""
    tiles = _decode_tiles(num_rows)
    pieces = tiles[:, 0].copy()
    tiles[:, 2] = 0
    table = np.zeros((num_rows, table_width), np.int32)
    parts = [np.zeros(1, np.int32), np.zeros(num_rows, np.int32), pieces, tiles, tiles[:0], table]
    return TritonStep(*_to_device(parts, device))


def _decode_tiles(num_rows: int) -> Int32Array:
    rows = np.arange(num_rows, dtype=np.int32)
    return np.stack([rows, rows, np.ones_like(rows)], axis=1)


def _to_device(parts: list[Int32Array], device: torch.device) -> list[torch.Tensor]:
    """Arrays as tensors on the device, moved together."""
    unit = _ALIGNMENT // np.dtype(np.int32).itemsize
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + -(-part.size // unit) * unit)
    together = torch.zeros(starts[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    array = together.numpy()
    for start, part in zip(starts, parts, strict=False):
        array[start : start + part.size] = part.ravel()
    moved = together.to(device, non_blocking=True)
    return [moved[start : start + part.size].view(part.shape) for start, part in zip(starts, parts, strict=False)]
