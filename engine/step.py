"""One step's inputs: which tokens are computed, and where their contexts lie.

Made once for a step, on the host, at a cost that does not grow with the contexts; backends derive from it what they need
(`Kernels.prepare`). Tokens are packed: first the chunks of one token (decoding), then the longer ones (prefill).
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from engine.block_pool import Lease
from engine.sequence import Sequence
from segue.errors import InternalError
from segue.kv_layout import KVLayout


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` uncomputed tokens of one sequence."""

    sequence: Sequence
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk with its place among the packed tokens: rows first_row ... are tokens start ... end - 1 of a sequence."""

    chunk_index: int
    first_row: int
    start: int
    # Length of the context with this chunk, in tokens.
    end: int
    # Its leading blocks hold the context.
    lease: Lease

    @property
    def num_rows(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class StepInputs:
    # [tokens] int64
    token_ids: torch.Tensor
    positions: torch.Tensor
    pieces: list[Piece]
    # Leading pieces of one token each.
    num_decoding: int
    # Rows whose next token is sampled [sampled] int64, and the index of the chunk that each of them ends.
    sampled_rows: torch.Tensor
    sampled_chunks: list[int]


def prepare_step(chunks: Rows[Chunk], layout: KVLayout) -> StepInputs:
    """Raises InternalError for a chunk beyond its sequence's tokens or its lease's blocks."""
    order = sorted(range(len(chunks)), key=lambda index: chunks[index].num_tokens > 1)
    pieces: list[Piece] = []
    token_ids: list[int] = []
    sampled_rows, sampled_chunks = [], []
    for index in order:
        sequence = chunks[index].sequence
        piece = _piece(index, len(token_ids), chunks[index], layout)
        token_ids += sequence.token_ids[piece.start : piece.end]
        pieces.append(piece)
        if piece.end == len(sequence.token_ids):
            sampled_rows.append(len(token_ids) - 1)
            sampled_chunks.append(index)
    num_decoding = sum(chunk.num_tokens == 1 for chunk in chunks)
    return StepInputs(
        token_ids=torch.tensor(token_ids),
        positions=positions_of(pieces, num_decoding),
        pieces=pieces,
        num_decoding=num_decoding,
        sampled_rows=torch.tensor(sampled_rows, dtype=torch.int64),
        sampled_chunks=sampled_chunks,
    )


def positions_of(pieces: Rows[Piece], num_decoding: int) -> torch.Tensor:
    """[tokens] int64"""
    positions = np.array([piece.start for piece in pieces[:num_decoding]], np.int64)
    if num_decoding < len(pieces):
        positions = np.concatenate([positions, *(np.arange(piece.start, piece.end) for piece in pieces[num_decoding:])])
    return torch.from_numpy(positions)


def _piece(index: int, first_row: int, chunk: Chunk, layout: KVLayout) -> Piece:
    sequence, num_tokens = chunk.sequence, chunk.num_tokens
    start, end = sequence.num_computed, sequence.num_computed + num_tokens
    if not 1 <= num_tokens <= sequence.num_uncomputed:
        raise InternalError(f"a chunk of {num_tokens} tokens of a sequence with {sequence.num_uncomputed} uncomputed")
    num_blocks = layout.num_blocks_for(end)
    lease = sequence.lease
    if lease is None or lease.is_released or len(lease.block_ids) < num_blocks:
        raise InternalError(f"the sequence's lease does not hold the {num_blocks} blocks that its step needs")
    return Piece(index, first_row, start, end, lease)
