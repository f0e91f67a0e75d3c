"""A step as rank 0 tells it to the others: whole numbers, one after the other.

num_pieces, num_decoding, num_sampled
of each piece   start, end, number of its blocks
token ids, sampled rows, then the blocks of all pieces
"""

from __future__ import annotations

import numpy as np
import torch

from engine.block_pool import Lease
from engine.step import Piece, StepInputs, positions_of

_HEADER_WORDS, _PIECE_WORDS = 3, 3


def pack_step(step: StepInputs) -> torch.Tensor:
    """[words] int32"""
    pieces = [(piece.start, piece.end, len(piece.lease.block_ids)) for piece in step.pieces]
    parts = [
        np.array([len(step.pieces), step.num_decoding, len(step.sampled_rows)], np.int32),
        np.array(pieces, np.int32).reshape(-1),
        step.token_ids.numpy().astype(np.int32),
        step.sampled_rows.numpy().astype(np.int32),
        *(np.frombuffer(piece.lease.block_ids, np.int32) for piece in step.pieces),
    ]
    return torch.from_numpy(np.concatenate(parts))


def unpack_step(words: torch.Tensor) -> StepInputs:
    """What `pack_step` was given, all but which chunks the pieces and the sampled rows belong to."""
    numbers = words.numpy()
    num_pieces, num_decoding, num_sampled = numbers[:_HEADER_WORDS].tolist()
    described, rest = np.split(numbers[_HEADER_WORDS:], [_PIECE_WORDS * num_pieces])
    spans = described.reshape(-1, _PIECE_WORDS).tolist()
    num_tokens = sum(end - start for start, end, _ in spans)
    token_ids, sampled_rows, blocks = np.split(rest, [num_tokens, num_tokens + num_sampled])
    pieces: list[Piece] = []
    first_row = first_block = 0
    for index, (start, end, num_blocks) in enumerate(spans):
        lease = Lease(blocks[first_block : first_block + num_blocks].tolist(), num_cached=0)
        pieces.append(Piece(index, first_row, start, end, lease))
        first_row += end - start
        first_block += num_blocks
    return StepInputs(
        token_ids=torch.from_numpy(token_ids.astype(np.int64)),
        positions=positions_of(pieces, num_decoding),
        pieces=pieces,
        num_decoding=num_decoding,
        sampled_rows=torch.from_numpy(sampled_rows.astype(np.int64)),
        sampled_chunks=[],
    )
