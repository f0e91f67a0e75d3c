"""Copying with checksums: the native way and the plain one against xxhash, for regions cut in every way."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer import spans

# Around the ends of what XXH3 treats alike: short inputs, stripes of 64 bytes, blocks of 1024.
REGION_BYTES = st.sampled_from([1, 63, 64, 192, 240, 241, 256, 320, 960, 1024, 1088, 2048, 2112, 12_672]) | st.integers(1, 3000)
MARGIN = 64


def cut(memory: bytearray, total: int, unit: int, ends: list[int]) -> list[memoryview]:
    """The bytes behind a margin, in buffers that end at multiples of `unit`."""
    edges = sorted({0, total, *(min(total, end * unit) for end in ends)})
    return [memoryview(memory)[MARGIN + start : MARGIN + end] for start, end in pairwise(edges)]


@pytest.fixture(params=["native", "plain"], scope="module")
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True, scope="module")
def chosen(way):
    with pytest.MonkeyPatch.context() as patch:
        if way == "plain":
            patch.setattr(spans, "_built_library", lambda: None)
        elif spans._built_library() is None:
            pytest.skip("no compiler was there when Segue was installed")
        yield


CUTS = st.lists(st.integers(0, 60), max_size=4)


@given(REGION_BYTES, st.integers(1, 4), st.sampled_from([1, 64, 96]), CUTS, CUTS, st.randoms())
def test_copies_and_checksums_whatever_is_cut_where(region_bytes, count, unit, source_ends, target_ends, random):
    total = region_bytes * count
    content = random.randbytes(total)
    source, target = bytearray(MARGIN) + content, bytearray(total + 2 * MARGIN)
    sources, targets = cut(source, total, unit, source_ends), cut(target, total, unit, target_ends)
    expected = [xxhash.xxh3_64_intdigest(content[i : i + region_bytes]) for i in range(0, total, region_bytes)]

    assert spans.checksums(sources, region_bytes) == expected
    assert spans.copy(sources, targets, region_bytes) == expected
    assert target == bytes(MARGIN) + content + bytes(MARGIN)


@pytest.mark.parametrize("offset", [0, 1, 16, 32])
def test_large_copies_to_any_alignment(offset):
    content = np.random.default_rng(1).integers(0, 256, 2**20, np.uint8)
    memory = np.zeros(2**20 + 128, np.uint8)
    target = memory[offset : offset + 2**20]
    found = spans.copy([content.data], [target.data], 2**16)
    assert found == [xxhash.xxh3_64_intdigest(region) for region in content.reshape(16, -1)]
    assert np.array_equal(target, content)
    assert not memory[:offset].any()
    assert not memory[offset + 2**20 :].any()


def test_reads_buffers_that_cannot_be_written():
    assert spans.checksums([memoryview(bytes(512))], 256) == [xxhash.xxh3_64_intdigest(bytes(256))] * 2


def test_nothing_is_copied_when_sizes_do_not_fit():
    target = memoryview(bytearray(512))
    with pytest.raises(ValueError, match="left over"):
        spans.copy([memoryview(b"x" * 512)], [target], 320)
    with pytest.raises(ValueError, match="do not fit"):
        spans.copy([memoryview(b"x" * 256)], [target], 256)
    assert not any(target)
