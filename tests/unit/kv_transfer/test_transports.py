from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.identity import host_identity
from kv_transfer.memory import KVMemory
from kv_transfer.plan import contiguous_runs
from kv_transfer.tensors import DeviceMemory
from kv_transfer.transports import (
    MAX_PUSH_BLOCKS,
    MAX_PUSH_BYTES,
    check_transports,
    choose_transport,
    plan_parcels,
)
from segue.errors import ConfigError
from segue.kv_layout import KVLayout
from segue.v1 import transfer_pb2 as pb

HERE = host_identity()
ELSEWHERE = pb.HostIdentity(boot_id="another", pid_namespace=HERE.pid_namespace)


@pytest.mark.parametrize(
    ("offered", "accepted", "host", "chosen"),
    [
        (["shm", "tcp"], ["shm", "tcp"], HERE, "shm"),
        (["shm", "tcp"], ["shm", "tcp"], ELSEWHERE, "tcp"),
        (["tcp"], ["shm", "tcp"], HERE, "tcp"),
        (["shm", "tcp"], ["tcp"], HERE, "tcp"),
        (["shm"], ["tcp"], HERE, None),
        (["shm"], ["shm"], ELSEWHERE, None),
        ([], ["shm", "tcp"], HERE, None),
        (["smoke signals", "local"], ["shm", "tcp", "local"], HERE, None),
    ],
)
def test_transport_is_the_best_that_both_have(offered, accepted, host, chosen):
    assert choose_transport(pb.Hello(host=host, transports=offered), HERE, accepted) == chosen


LAYOUT = KVLayout(1, 1, 4, 4, "float32", "r")


@pytest.mark.parametrize("transports", [(), ("rdma",), ("tcp", "local")])
def test_unknown_transports_are_refused(transports):
    with KVMemory.allocate(LAYOUT, 1) as memory, pytest.raises(ConfigError, match="kv_transport"):
        check_transports(transports, memory)


def test_what_only_its_own_process_can_reach_travels_by_dist_alone():
    memory = DeviceMemory.allocate(LAYOUT, 2, "cpu")
    assert check_transports(("dist",), memory) == ("dist",)
    for transports in (("shm",), ("dist", "tcp")):
        with pytest.raises(ConfigError, match="dist alone"):
            check_transports(transports, memory)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_runs_cover_everything_once_and_count_up(numbers):
    runs = list(contiguous_runs(numbers))
    assert [position for start, length in runs for position in range(start, start + length)] == list(range(len(numbers)))
    for start, length in runs:
        assert numbers[start : start + length] == list(range(numbers[start], numbers[start] + length))
    for (start, length), (following, _) in itertools.pairwise(runs):
        assert numbers[following] != numbers[start + length - 1] + 1


@settings(max_examples=60)
@given(
    st.sampled_from(["shm", "tcp", "dist"]),
    st.integers(0, 1200),
    st.sampled_from([64, 24_576, MAX_PUSH_BYTES, 3 * MAX_PUSH_BYTES]),
)
def test_parcels_are_bounded_and_complete(transport, num_blocks, region_bytes):
    block_ids = [7 * index for index in range(num_blocks)]
    parcels = list(plan_parcels(transport, 2, range(num_blocks), block_ids, region_bytes))
    assert [index for parcel in parcels for index in parcel.indices] == list(range(num_blocks))
    for parcel in parcels:
        assert parcel.targets == [block_ids[index] for index in parcel.indices]
        assert len(parcel.targets) <= MAX_PUSH_BLOCKS
        assert len(parcel.targets) == 1 or len(parcel.targets) * region_bytes <= MAX_PUSH_BYTES
