"""Layout plans: however two workers cut and store the same KV, every number arrives at its place."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kv_cache import KVCache
from kv_transfer.memory import KVMemory
from kv_transfer.plan import RegionFormat, SourceRegions, TargetRegions, format_of, mismatch, peer_layout, shared_heads
from segue.errors import TransferRefused
from segue.kv_layout import KVLayout
from segue.v1 import transfer_pb2 as pb

dtypes = st.sampled_from(["float32", "bfloat16", "int8"])


def stored(values: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """float32 [..., head_dim] as a cache of that format holds it, with int8's scales."""
    if dtype == "int8":
        largest = values.abs().amax(-1)
        # In two steps, divisions both, as the kernels do; torch would multiply by a reciprocal.
        inverse = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)
        return (values * inverse[..., None]).round().to(torch.int8), largest / 127
    return values.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]), None


def read(values: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return values.to(torch.float32) * (1 if scales is None else scales[..., None])


class Worker:
    """The ranks of one worker, whose caches hold `tokens` of a prompt in blocks of their own."""

    def __init__(self, stack: ExitStack, layout: KVLayout, num_ranks: int, num_tokens: int, seed: int) -> None:
        share = layout.total_kv_heads // num_ranks
        self.layouts = [replace(layout, num_kv_heads=share, num_ranks=num_ranks, rank=rank) for rank in range(num_ranks)]
        num_blocks = layout.num_blocks_for(num_tokens)
        self.blocks = [int(block) for block in np.random.default_rng(seed).permutation(num_blocks + 3)[:num_blocks]]
        self.memories = [stack.enter_context(KVMemory.allocate(rank, num_blocks + 3)) for rank in self.layouts]
        # Whatever lies in memory that nobody wrote must not matter.
        for memory in self.memories:
            memory.buffer[:] = bytes([0x5A]) * memory.num_bytes
        self.num_tokens = num_tokens

    def _views(self) -> Sequence[tuple[KVLayout, KVCache]]:
        caches = [KVCache.over(memory.buffer, memory.layout, memory.num_blocks) for memory in self.memories]
        return list(zip(self.layouts, caches, strict=True))

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """keys, values: float32 [layers, heads, tokens, head_dim] of the whole model"""
        for layout, cache in self._views():
            for layer in range(layout.num_layers):
                for token in range(self.num_tokens):
                    block, offset = self.blocks[token // layout.block_size], token % layout.block_size
                    numbers, scales = stored(keys[layer, layout.heads.start : layout.heads.stop, token], layout.dtype)
                    cache.keys(layer)[block, :, :, offset] = numbers
                    if scales is not None:
                        cache.scales(layer)[block, 0, :, offset] = scales
                    numbers, scales = stored(values[layer, layout.heads.start : layout.heads.stop, token], layout.dtype)
                    cache.values(layer)[block, :, offset] = numbers
                    if scales is not None:
                        cache.scales(layer)[block, 1, :, offset] = scales

    def read(self) -> torch.Tensor:
        """float32 [layers, 2, heads, tokens, head_dim] of the whole model"""
        ranks = []
        for layout, cache in self._views():
            layers = []
            for layer in range(layout.num_layers):
                blocks = torch.tensor(self.blocks)
                scales = cache.scales(layer)[blocks] if layout.dtype == "int8" else None
                keys = read(
                    cache.keys(layer)[blocks].permute(1, 0, 3, 2), None if scales is None else scales[:, 0].transpose(0, 1)
                )
                values = read(
                    cache.values(layer)[blocks].permute(1, 0, 2, 3), None if scales is None else scales[:, 1].transpose(0, 1)
                )
                layers.append(torch.stack([keys.flatten(1, 2), values.flatten(1, 2)]))
            ranks.append(torch.stack(layers))
        return torch.cat(ranks, 2)[:, :, :, : self.num_tokens]


def move(source: Worker, target: Worker, wire_dtype: str, first_block: int, pieces: int) -> None:
    """Every pair of ranks moves what it shares, in `pieces` parcels a layer."""
    for layout, memory in zip(target.layouts, target.memories, strict=True):
        for rank, source_memory in enumerate(source.memories):
            heads = shared_heads(layout, rank, len(source.memories))
            if not heads:
                continue
            form = RegionFormat.of(heads, head_dim=layout.head_dim, block_size=layout.block_size, dtype=wire_dtype)
            for layer in range(layout.num_layers):
                for part in np.array_split(np.arange(first_block, len(target.blocks)), pieces):
                    if not len(part):
                        continue
                    regions = SourceRegions(source_memory, form).take(layer, source.blocks, part.tolist())
                    assert sum(region.nbytes for region in regions) == len(part) * form.region_bytes
                    assert all(region.nbytes % form.region_bytes == 0 for region in regions)
                    into = TargetRegions(memory, form)
                    take = into.copy if into.is_direct else into.convert
                    take(layer, [target.blocks[index] for index in part], regions)


@settings(max_examples=120, deadline=None)
@given(
    data=st.data(),
    num_layers=st.integers(1, 3),
    total_heads=st.sampled_from([1, 2, 3, 4, 6]),
    head_dim=st.sampled_from([4, 8]),
    block_sizes=st.tuples(st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 3, 4, 8])),
    formats=st.tuples(dtypes, dtypes, dtypes),
    num_tokens=st.integers(1, 30),
    pieces=st.integers(1, 3),
)
def test_any_two_ways_to_cut_and_store_kv_fit(
    data, num_layers, total_heads, head_dim, block_sizes, formats, num_tokens, pieces
):
    degrees = [degree for degree in (1, 2, 3, 4) if total_heads % degree == 0]
    source_ranks, target_ranks = data.draw(st.sampled_from(degrees)), data.draw(st.sampled_from(degrees))
    random = torch.Generator().manual_seed(num_tokens)
    shape = (num_layers, total_heads, num_tokens, head_dim)
    keys, values = (torch.randn(shape, generator=random) for _ in "kv")
    keys[:, :, 0] = 0  # int8 scales a row of zeros by zero
    # Halfway between two bfloat16 numbers, half of them.
    values = (values.view(torch.int32) & ~0x7FFF).view(torch.float32)
    with ExitStack() as stack:
        workers = [
            Worker(stack, KVLayout(num_layers, total_heads, head_dim, size, dtype, "r"), ranks, num_tokens, seed)
            for seed, (size, dtype, ranks) in enumerate(
                zip(block_sizes, formats[:2], (source_ranks, target_ranks), strict=True)
            )
        ]
        source, target = workers
        source.fill(keys, values)
        first_block = data.draw(st.integers(0, len(target.blocks)))
        move(source, target, formats[2], 0, pieces)
        expected = torch.stack([keys, values], 1)
        # Each format on the way rounds once, except that numbers pass unchanged between equal ones.
        for index, dtype in enumerate((formats[0], formats[2], formats[1])):
            if index == 0 or dtype != (formats[0], formats[2], formats[1])[index - 1]:
                expected = read(*stored(expected, dtype))
        arrived = target.read()
        assert torch.equal(arrived, expected)
        # A later part alone leaves what lies before it as it is.
        target.memories[0].buffer[:] = bytes(target.memories[0].num_bytes)
        move(source, target, formats[2], first_block, pieces)
        start = min(first_block * block_sizes[1], num_tokens)
        own = target.layouts[0].heads
        again = target.read()[:, :, own.start : own.stop]
        assert torch.equal(again[:, :, :, start:], expected[:, :, own.start : own.stop, start:])
        assert not again[:, :, :, :start].any()


@given(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), st.integers(1, 12), st.integers(1, 12))
def test_ranks_share_every_head_exactly_once(total_heads, source_ranks, target_ranks):
    share = total_heads // target_ranks
    if total_heads % target_ranks:
        return
    layouts = [KVLayout(1, share, 4, 4, "float32", "r", rank=rank, num_ranks=target_ranks) for rank in range(target_ranks)]
    if total_heads % source_ranks:
        with pytest.raises(TransferRefused, match="cannot be shared out"):
            shared_heads(layouts[0], 0, source_ranks)
        return
    heads = [head for layout in layouts for rank in range(source_ranks) for head in shared_heads(layout, rank, source_ranks)]
    assert sorted(heads) == list(range(total_heads))


LAYOUT = KVLayout(1, 2, 4, 4, "float32", "r", rank=1, num_ranks=2)


def test_a_peer_says_how_it_stores_the_same_kv():
    peer = replace(LAYOUT, num_kv_heads=4, dtype="int8", block_size=8, rank=0, num_ranks=1)
    assert peer_layout(LAYOUT, format_of(peer, "")) == peer
    for nonsense in ({"dtype": "float8"}, {"block_size": 0}, {"num_ranks": 3}, {"num_ranks": 0}, {"rank": 4}):
        told = format_of(LAYOUT, "")
        for name, value in nonsense.items():
            setattr(told, name, value)
        with pytest.raises(TransferRefused, match="makes no sense"):
            peer_layout(LAYOUT, told)


@pytest.mark.parametrize(
    ("prefill", "decode", "fits"),
    [
        (("float32", ""), ("float32", ""), True),
        (("float32", "bfloat16"), ("float32", "bfloat16"), True),
        (("float32", "int8"), ("bfloat16", "int8"), True),
        (("float32", ""), ("bfloat16", ""), False),
        (("float32", "bfloat16"), ("float32", ""), False),
        (("float32", "bfloat16"), ("bfloat16", "int8"), False),
    ],
)
def test_numbers_are_converted_only_when_both_sides_say_so(prefill, decode, fits):
    sides = [pb.KVFormat(dtype=dtype, wire_dtype=wire) for dtype, wire in (prefill, decode)]
    assert (mismatch(*sides) == "") == fits
    assert fits or "kv_wire" in mismatch(*sides)
