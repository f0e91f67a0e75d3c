"""Sampling limits, layouts, prefix hashes, errors on the wire, the life-cycle table, wire round trips."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.errors import InternalError, InvalidRequest, SegueError, WorkerLost, error_from_code
from segue.kv_layout import KVLayout
from segue.lifecycle import TERMINAL, TRANSITIONS, Lifecycle, Phase
from segue.prefix import block_hashes
from segue.sampling import FinishReason, GeneratedToken, SamplingParams
from segue.wire import (
    finish_reason_from_pb,
    finish_reason_to_pb,
    sampling_from_pb,
    sampling_to_pb,
    token_from_pb,
    token_to_pb,
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", 9),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 1.5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**64),
        ("logit_bias", {3: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", dict.fromkeys(range(1025), 0.0)),
        ("stop_token_ids", tuple(range(65))),
    ],
)
def test_sampling_refuses_and_names_the_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**({"max_tokens": 8} | {field: value}))  # type: ignore[arg-type]
    assert caught.value.field == field


def test_logprobs_are_refused_under_the_name_clients_use() -> None:
    with pytest.raises(InvalidRequest, match=r"^logprobs: must be 0 to 20"):
        SamplingParams(max_tokens=1, num_logprobs=21)


@given(
    st.builds(
        SamplingParams,
        max_tokens=st.integers(8, 1000),
        min_tokens=st.integers(0, 8),
        temperature=st.floats(0, 10),
        top_p=st.floats(0.01, 1),
        top_k=st.integers(0, 100),
        min_p=st.floats(0, 1),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        repetition_penalty=st.floats(0.1, 3),
        logit_bias=st.dictionaries(st.integers(0, 50_000), st.floats(-100, 100), max_size=3),
        seed=st.integers(0, 2**64 - 1),
        stop_token_ids=st.lists(st.integers(0, 50_000), max_size=3).map(tuple),
        num_logprobs=st.none() | st.integers(0, 20),
    )
)
def test_sampling_survives_the_wire(params: SamplingParams) -> None:
    assert sampling_from_pb(sampling_to_pb(params)) == params


@pytest.mark.parametrize("token", [GeneratedToken(7), GeneratedToken(7, -0.5, ((7, -0.5), (9, -1.0))), GeneratedToken(0, 0.0)])
def test_tokens_survive_the_wire(token: GeneratedToken) -> None:
    assert token_from_pb(token_to_pb(token)) == token


@pytest.mark.parametrize("reason", [None, *FinishReason])
def test_finish_reasons_survive_the_wire(reason: FinishReason | None) -> None:
    assert finish_reason_from_pb(finish_reason_to_pb(reason)) is reason


def all_error_classes(root: type[SegueError] = SegueError) -> list[type[SegueError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in all_error_classes(child))]


@pytest.mark.parametrize("error_class", all_error_classes())
def test_an_error_comes_back_from_the_wire_with_the_same_meaning(error_class: type[SegueError]) -> None:
    again = error_from_code(error_class.code, "why", "field")
    assert (again.code, again.grpc_status, again.http_status, again.retryable, again.message, again.field) == (
        error_class.code,
        error_class.grpc_status,
        error_class.http_status,
        error_class.retryable,
        "why",
        "field",
    )


def test_an_unknown_error_code_is_an_internal_error() -> None:
    assert type(error_from_code("from_the_future", "m")) is InternalError
    assert type(error_from_code(WorkerLost.code, "m")) is WorkerLost


def test_layout_sizes_and_fingerprint() -> None:
    layout = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="float32", model_revision="r")
    assert layout.region_bytes == 2 * 3 * 16 * 64 * 4
    assert layout.block_bytes == 30 * layout.region_bytes
    assert [layout.num_blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert replace(layout, dtype="bfloat16").region_bytes == layout.region_bytes / 2
    assert replace(layout, dtype="int8").region_bytes == 2 * 3 * 16 * (64 + 4)
    assert replace(layout, weights="float32 int8/int4").fingerprint() != layout.fingerprint()
    # The same KV, cut and stored otherwise.
    for same in (
        {"block_size": 32},
        {"dtype": "bfloat16"},
        {"num_kv_heads": 1, "num_ranks": 3, "rank": 2},
    ):
        assert replace(layout, **same).fingerprint() == layout.fingerprint()
    assert replace(layout, num_ranks=2).fingerprint() != layout.fingerprint()
    assert list(replace(layout, num_kv_heads=1, num_ranks=3, rank=2).heads) == [2]
    other = KVLayout(num_layers=30, num_kv_heads=3, head_dim=64, block_size=16, dtype="float32", model_revision="s")
    assert layout.fingerprint() != other.fingerprint()
    # Processes of different versions and hosts compare it: it must never drift.
    assert layout.fingerprint() == "71f42fe9f12aa8b648728e99de98d4be"


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 7), st.data())
def test_hashes_chain(tokens: list[int], block_size: int, data: st.DataObject) -> None:
    hashes = block_hashes(tokens, block_size)
    assert len(hashes) == len(tokens) // block_size
    cut = data.draw(st.integers(0, len(hashes)))
    rest = block_hashes(tokens[cut * block_size :], block_size, parent=hashes[cut - 1] if cut else b"")
    assert hashes[:cut] + rest == hashes


@given(st.lists(st.integers(0, 100), min_size=8, max_size=8), st.integers(0, 7))
def test_a_changed_token_changes_its_block_and_all_after_it(tokens: list[int], position: int) -> None:
    changed = [*tokens]
    changed[position] += 1
    before, after = block_hashes(tokens, 2), block_hashes(changed, 2)
    assert [a == b for a, b in zip(before, after, strict=True)] == [i < position // 2 for i in range(4)]


def test_salt_separates_caches() -> None:
    assert block_hashes([1, 2], 2, salt=b"a") != block_hashes([1, 2], 2, salt=b"b")


def test_every_phase_can_end_and_no_terminal_phase_can_go_on() -> None:
    for phase, nexts in TRANSITIONS.items():
        assert not nexts if phase in TERMINAL else {Phase.FAILED, Phase.CANCELLED} <= nexts
    assert set(TRANSITIONS) == set(Phase)


def test_lifecycle_measures_and_refuses() -> None:
    times = iter([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    life = Lifecycle(clock=lambda: next(times))
    life.enter(Phase.RESERVED)
    life.enter(Phase.TRANSFERRING)
    assert life.seconds(Phase.QUEUED, Phase.TRANSFERRING) == 3.0
    assert life.seconds(Phase.QUEUED, Phase.DECODING) is None
    with pytest.raises(ValueError, match="no transition from transferring to prefilling"):
        life.enter(Phase.PREFILLING)
    assert life.phase is Phase.TRANSFERRING
    for phase in (Phase.QUEUED, Phase.RESERVED, Phase.TRANSFERRING, Phase.DECODING):
        life.enter(phase)  # another attempt
    assert life.seconds(Phase.QUEUED, Phase.TRANSFERRING) == 3.0, "the client has its first token since the first attempt"
    assert life.seconds(Phase.TRANSFERRING, Phase.DECODING) == 60.0, "and waited until the second one decoded"
    assert [entered_s for _, entered_s in life.history] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
