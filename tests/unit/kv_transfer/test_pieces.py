"""Copying with checksums: both native ways and the plain one against xxhash, for regions in pieces of every size."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer import pieces
from kv_transfer.pieces import Pieces

# Around the ends of what XXH3 treats alike: short inputs, stripes of 64 bytes, blocks of 1024.
PIECE_BYTES = st.sampled_from([1, 63, 64, 128, 192, 240, 241, 256, 320, 960, 1024, 1088, 2048, 2112, 12_672])


@pytest.fixture(params=["native", "native without AVX2", "plain"], scope="module", autouse=True)
def way(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(pieces, "_built_library", lambda: None)
        elif pieces._built_library() is None:
            pytest.skip("no compiler was there when Segue was installed")
        elif request.param == "native without AVX2":
            library = pieces.open_library(str(build_without_avx2(tmp_path_factory.mktemp("library") / "pieces.so")))
            patch.setattr(pieces, "_built_library", lambda: library)
        yield


def build_without_avx2(library: Path) -> Path:
    source = Path(pieces.__file__).parent / "csrc" / "pieces.cpp"
    options = ("-std=c++20", "-O1", "-shared", "-fPIC", "-D__builtin_cpu_supports(name)=false")
    subprocess.run(["g++", *options, str(source), "-o", str(library)], check=True)
    return library


def shuffled(memory: bytearray, num_pieces: int, piece_bytes: int, order: list[int]) -> list[memoryview]:
    """Pieces of `memory` in some order, each behind a gap of its own size."""
    size = 2 * piece_bytes
    return [memoryview(memory)[place * size + piece_bytes : (place + 1) * size] for place in order[:num_pieces]]


@given(PIECE_BYTES, st.integers(1, 3), st.integers(1, 3), st.integers(0, 4), st.data())
def test_copies_and_checksums_whatever_lies_where(piece_bytes, source_share, target_share, num_regions, data):
    region_bytes = piece_bytes * source_share * target_share
    source_bytes, target_bytes = region_bytes, region_bytes // target_share
    random = data.draw(st.randoms())
    content = random.randbytes(num_regions * region_bytes)
    source = bytearray(2 * len(content))
    sources = shuffled(source, num_regions, source_bytes, random.sample(range(num_regions), num_regions))
    for number, buffer in enumerate(sources):
        buffer[:] = content[number * source_bytes : (number + 1) * source_bytes]
    target = bytearray(2 * len(content))
    count = num_regions * target_share
    targets = shuffled(target, count, target_bytes, random.sample(range(count), count))
    expected = [xxhash.xxh3_64_intdigest(content[i : i + region_bytes]) for i in range(0, len(content), region_bytes)]

    assert pieces.checksums(Pieces.of(sources, piece_bytes), region_bytes) == expected
    assert pieces.copy(Pieces.of(sources, region_bytes), Pieces.of(targets, target_bytes), region_bytes) == expected
    assert b"".join(targets) == content
    assert pieces.copy(Pieces.of(targets, target_bytes), Pieces.of(sources, region_bytes), region_bytes) == expected
    for buffer in targets:
        buffer[:] = bytes(target_bytes)
    assert not any(target), "something was written beside the pieces"


@pytest.mark.parametrize("offset", [0, 1, 16, 32])
def test_large_copies_to_any_alignment(offset):
    """Aligned ones go past the caches."""
    content = np.random.default_rng(1).integers(0, 256, 2**20, np.uint8)
    memory = np.zeros(2**20 + 192, np.uint8)
    offset += -pieces.address_of(memory) % 64
    target = memory[offset : offset + 2**20]
    found = pieces.copy(Pieces.of([content.data], 2**16), Pieces.of([target.data], 2**16), 2**16)
    assert found == [xxhash.xxh3_64_intdigest(region) for region in content.reshape(16, -1)]
    assert np.array_equal(target, content)
    assert not memory[:offset].any()
    assert not memory[offset + 2**20 :].any()


def test_reads_buffers_that_cannot_be_written():
    assert pieces.checksums(Pieces.of([memoryview(bytes(512))], 256), 256) == [xxhash.xxh3_64_intdigest(bytes(256))] * 2


def test_nothing_is_copied_when_sizes_do_not_fit():
    target = memoryview(bytearray(512))
    with pytest.raises(ValueError, match="left over"):
        pieces.copy(Pieces.of([memoryview(b"x" * 512)], 64), Pieces.of([target], 64), 320)
    with pytest.raises(ValueError, match="do not fit"):
        pieces.copy(Pieces.of([memoryview(b"x" * 256)], 64), Pieces.of([target], 64), 256)
    with pytest.raises(ValueError, match="in pieces of 320"):
        Pieces.of([target], 320)
    assert not any(target)
