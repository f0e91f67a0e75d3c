from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kv_transfer.memory import KVMemory
from segue.errors import ConfigError, TransferError
from segue.kv_layout import KVLayout

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=2, dtype="float32", model_revision="test")

_WRITE_FROM_OUTSIDE = """
import sys
from kv_transfer.memory import KVMemory
from segue.kv_layout import KVLayout
from segue.v1 import transfer_pb2 as pb
layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=2, dtype="float32", model_revision="test")
with KVMemory.open(layout, pb.SharedSegment.FromString(bytes.fromhex(sys.argv[1]))) as memory:
    memory.region(2, 1)[:] = b"x" * layout.region_bytes
"""


def test_regions_lie_as_the_layout_says():
    with KVMemory.allocate(LAYOUT, 5) as memory:
        size = LAYOUT.region_bytes
        assert len(memory.buffer) == 3 * 5 * size
        memory.region(1, 2)[:] = b"a" * size
        start = (1 * 5 + 2) * size
        assert memory.buffer[start : start + size] == b"a" * size
        assert bytes(memory.buffer).count(b"a") == size
        assert len(memory.regions(0, 1, 3)) == 3 * size


@pytest.mark.parametrize(("layer", "block", "count"), [(3, 0, 1), (-1, 0, 1), (0, 5, 1), (0, -1, 1), (0, 3, 3), (0, 3, -1)])
def test_regions_outside_are_refused(layer: int, block: int, count: int):
    with KVMemory.allocate(LAYOUT, 5) as memory, pytest.raises(IndexError):
        memory.regions(layer, block, count)


def test_another_process_writes_in_place():
    with KVMemory.allocate(LAYOUT, 5) as memory:
        segment = memory.segment.SerializeToString().hex()
        subprocess.run([sys.executable, "-c", _WRITE_FROM_OUTSIDE, segment], check=True, timeout=60)
        assert memory.region(2, 1) == b"x" * LAYOUT.region_bytes
        assert bytes(memory.buffer).count(b"x") == LAYOUT.region_bytes


def test_opened_memory_is_what_it_claims_to_be(tmp_path):
    with KVMemory.allocate(LAYOUT, 5) as memory, KVMemory.allocate(LAYOUT, 5) as other:
        renamed = memory.segment
        renamed.fd = other.segment.fd
        with pytest.raises(TransferError, match="not the peer's"):
            KVMemory.open(LAYOUT, renamed)
        larger = memory.segment
        larger.num_blocks = 6
        with pytest.raises(TransferError, match="bytes"):
            KVMemory.open(LAYOUT, larger)
        gone = memory.segment
        gone.fd = 999_999
        with pytest.raises(TransferError, match="cannot open"):
            KVMemory.open(LAYOUT, gone)


def test_memory_that_could_shrink_is_refused():
    fd = os.memfd_create("segue-kv-loose", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, LAYOUT.block_bytes)
    with KVMemory.allocate(LAYOUT, 1) as memory:
        segment = memory.segment
    segment.fd, segment.name = fd, "segue-kv-loose"
    with pytest.raises(TransferError, match="change its size"):
        KVMemory.open(LAYOUT, segment)
    os.close(fd)


def test_nobody_can_cut_it_short():
    with KVMemory.allocate(LAYOUT, 5) as memory, pytest.raises(PermissionError):
        os.ftruncate(memory.segment.fd, 0)


def test_nothing_is_left_behind():
    before = set(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))
    with KVMemory.allocate(LAYOUT, 5) as memory:
        KVMemory.open(LAYOUT, memory.segment).close()
        assert set(os.listdir("/dev/shm")) == before[1]
    memory.close()
    assert (set(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))) == before


def test_views_outlive_close():
    memory = KVMemory.allocate(LAYOUT, 5)
    view = memory.region(0, 0)
    memory.close()
    view[:] = b"b" * len(view)
    assert view[0] == ord("b")


def test_impossible_sizes_name_the_setting():
    with pytest.raises(ConfigError, match="kv_memory"):
        KVMemory.allocate(LAYOUT, 0)
    with pytest.raises(ConfigError, match="kv_memory"):
        KVMemory.allocate(LAYOUT, 2**40)
