"""One step's inputs: which tokens are computed, where their KV goes and what each of them attends to.

All index tensors are made here, once for a step; the layers only use them. Tokens are packed: first the chunks of one token
(decoding), in groups of similar context length, then the longer chunks (prefill), one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch

from engine.sequence import Sequence
from segue.errors import InternalError
from segue.kv_layout import KVLayout

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` uncomputed tokens of one sequence."""

    sequence: Sequence
    num_tokens: int


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Tokens first_row ... first_row + num_rows - 1, each the last of its own context."""

    first_row: int
    num_rows: int
    # Slabs of all contexts, padded to the longest. [2 * num_rows * num_kv_heads * num_blocks]
    slabs: torch.Tensor
    # Longest context, in tokens.
    num_positions: int
    # 0 where a row may look, -inf beyond its end: [num_rows, 1, 1, num_positions]; None when all contexts are equally long.
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens first_row ... first_row + num_rows - 1 of one context, which end it."""

    first_row: int
    num_rows: int
    # Slabs of the context [2 * num_kv_heads * num_blocks]; None when the chunk is the whole context.
    slabs: torch.Tensor | None
    # Length of the context with this chunk, in tokens.
    num_positions: int
    # 0 where a token may look, -inf at later tokens: [num_rows, num_positions]; None when the chunk is the whole context.
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class StepInputs:
    # [tokens] int64
    token_ids: torch.Tensor
    positions: torch.Tensor
    # Slots that each token's K heads and then V heads go to. [tokens * 2 * num_kv_heads] int64
    slots: torch.Tensor
    decode_groups: list[DecodeGroup]
    prefill_chunks: list[PrefillChunk]
    # Rows whose next token is sampled [sampled] int64, and the index of the chunk that each of them ends.
    sampled_rows: torch.Tensor
    sampled_chunks: list[int]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A chunk with its place among the packed tokens."""

    chunk_index: int
    sequence: Sequence
    first_row: int
    # Tokens start ... end - 1 of the sequence; end is the length of their context.
    start: int
    end: int
    # Blocks of the context.
    block_ids: Int64Array

    @property
    def num_rows(self) -> int:
        return self.end - self.start


def prepare_step(chunks: Rows[Chunk], layout: KVLayout, dtype: torch.dtype) -> StepInputs:
    """Raises InternalError for a chunk beyond its sequence's tokens or its lease's blocks."""
    pieces = _pack(chunks, layout)
    num_decoding = sum(piece.num_rows == 1 for piece in pieces)
    groups = groupby(pieces[:num_decoding], key=lambda piece: len(piece.block_ids).bit_length())
    positions = np.concatenate([np.arange(piece.start, piece.end) for piece in pieces])
    block_ids = np.concatenate([piece.block_ids[np.arange(piece.start, piece.end) // layout.block_size] for piece in pieces])
    sampled = [piece for piece in pieces if piece.end == len(piece.sequence.token_ids)]
    return StepInputs(
        token_ids=torch.tensor([token for piece in pieces for token in piece.sequence.token_ids[piece.start : piece.end]]),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(_slots(block_ids, positions, layout)),
        decode_groups=[_decode_group(list(group), layout, dtype) for _, group in groups],
        prefill_chunks=[_prefill_chunk(piece, layout, dtype) for piece in pieces[num_decoding:]],
        sampled_rows=torch.tensor([piece.first_row + piece.num_rows - 1 for piece in sampled], dtype=torch.int64),
        sampled_chunks=[piece.chunk_index for piece in sampled],
    )


def _pack(chunks: Rows[Chunk], layout: KVLayout) -> list[_Piece]:
    """Single tokens first, those with similar contexts side by side; then the longer chunks."""
    pieces = []
    first_row = 0
    order = sorted(range(len(chunks)), key=lambda index: (chunks[index].num_tokens > 1, _context(chunks[index])))
    for index in order:
        sequence, num_tokens = chunks[index].sequence, chunks[index].num_tokens
        end = _context(chunks[index])
        num_blocks = layout.num_blocks_for(end)
        if not 1 <= num_tokens <= sequence.num_uncomputed:
            raise InternalError(f"a chunk of {num_tokens} tokens of a sequence with {sequence.num_uncomputed} uncomputed")
        if sequence.lease is None or sequence.lease.is_released or len(sequence.lease.block_ids) < num_blocks:
            raise InternalError(f"the sequence's lease does not hold the {num_blocks} blocks that its step needs")
        block_ids = np.array(sequence.lease.block_ids[:num_blocks])
        pieces.append(_Piece(index, sequence, first_row, sequence.num_computed, end, block_ids))
        first_row += num_tokens
    return pieces


def _context(chunk: Chunk) -> int:
    return chunk.sequence.num_computed + chunk.num_tokens


def _slots(block_ids: Int64Array, positions: Int64Array, layout: KVLayout) -> Int64Array:
    """Slots of tokens in blocks `block_ids` [tokens] at `positions` [tokens]; see StepInputs.slots."""
    slabs_per_block = 2 * layout.num_kv_heads
    slabs = block_ids[:, None] * slabs_per_block + np.arange(slabs_per_block)
    return (slabs * layout.block_size + (positions % layout.block_size)[:, None]).ravel()


def _slabs(block_ids: Int64Array, layout: KVLayout) -> torch.Tensor:
    """Slabs of contexts [contexts, blocks] in the order [K then V][context][head][block], flattened."""
    kv_and_head = np.arange(2 * layout.num_kv_heads).reshape(2, 1, layout.num_kv_heads, 1)
    return torch.from_numpy((block_ids[None, :, None, :] * (2 * layout.num_kv_heads) + kv_and_head).ravel())


def _decode_group(pieces: list[_Piece], layout: KVLayout, dtype: torch.dtype) -> DecodeGroup:
    contexts = np.array([piece.end for piece in pieces])
    longest = int(contexts.max())
    # Shorter contexts are padded with block 0: any block will do, the mask hides it.
    padded = np.zeros((len(pieces), layout.num_blocks_for(longest)), np.int64)
    for row, piece in enumerate(pieces):
        padded[row, : len(piece.block_ids)] = piece.block_ids
    mask = None
    if contexts.min() != longest:
        is_beyond = torch.from_numpy(np.arange(longest) >= contexts[:, None])
        mask = torch.zeros(is_beyond.shape, dtype=dtype).masked_fill_(is_beyond, -torch.inf)[:, None, None]
    return DecodeGroup(pieces[0].first_row, len(pieces), _slabs(padded, layout), longest, mask)


def _prefill_chunk(piece: _Piece, layout: KVLayout, dtype: torch.dtype) -> PrefillChunk:
    if piece.start == 0:
        return PrefillChunk(piece.first_row, piece.num_rows, None, piece.end, None)
    mask = torch.full((piece.num_rows, piece.end), -torch.inf, dtype=dtype).triu_(piece.start + 1)
    return PrefillChunk(piece.first_row, piece.num_rows, _slabs(piece.block_ids[None], layout), piece.end, mask)
