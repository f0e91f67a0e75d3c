from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue.chaos import FRAMES, STEPS, Chaos, ChaosSpec, Strike, Strikes
from segue.config import ClusterSettings
from segue.errors import ConfigError


def test_every_part_is_read() -> None:
    text = "seed=7, drop=0.01,cut=.5,corrupt=1,delay=5ms,kill=decode@push:3,stop=prefill@after-open:1:0.5s"
    assert ChaosSpec.parse(text) == ChaosSpec(
        seed=7,
        drop=0.01,
        cut=0.5,
        corrupt=1.0,
        delay_s=0.005,
        strikes=(Strike("decode", "push", 3), Strike("prefill", "open", 1, after=True, pause_s=0.5)),
    )
    assert ChaosSpec.parse("") == ChaosSpec()
    strikes = "kill=decode@push:3,stop=prefill@after-open:1:0.5s"
    assert ",".join(map(str, ChaosSpec.parse(strikes).strikes)) == strikes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("speed=3", r"'speed=3' is not known; there are: seed=NUMBER, drop=PROBABILITY"),
        ("drop", r"'drop': '' is no probability"),
        ("drop=1.5", r"'drop=1.5': '1.5' is no probability; give a number from 0 to 1"),
        ("corrupt=-1", r"'corrupt=-1': '-1' is no probability"),
        ("drop=nan", r"'nan' is no probability"),
        ("drop=0.1,drop=0.2", r"'drop=0.2': drop was given before"),
        ("delay=5ms,delay=6ms", r"'delay=6ms': delay was given before"),
        ("seed=one", r"'seed=one': 'one' is no whole number"),
        ("delay=5", r"'delay=5': '5' is no time; give one such as 5ms or 0.2s"),
        ("kill=decode", r"'kill=decode' is not understood; write it like kill=decode@push:3 or kill=decode@after-push:3"),
        ("kill=decode@push:0", r"'kill=decode@push:0' is not understood"),
        ("kill=decode@push:3:2s", r"'kill=decode@push:3:2s' is not understood"),
        ("stop=decode@push:3", r"'stop=decode@push:3' is not understood; write it like stop=decode@push:3:2s"),
        ("stop=decode@push:3:2", r"'2' is no time"),
        ("kill=router@push:1", r"there is no role 'router'; there are: prefill, decode"),
        ("kill=decode@psuh:1", r"there is no event 'psuh'; there are: hello, .*push, .*accepted"),
        ("kill=decode@after-granted:1", r"granted is a moment and no frame; write decode@granted"),
    ],
)
def test_a_bad_part_is_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^bad settings: chaos: Value error, .*{says}"):
        ClusterSettings.load(flags={"chaos": f"cut=0.1,{text}"}, env={})


def fates(chaos: Chaos, frame: str, count: int = 200) -> list[tuple[float, bool, bool]]:
    drawn = [chaos.fate(frame) for _ in range(count)]
    return [(fate.delay_s, fate.is_dropped, fate.is_cut) for fate in drawn]


SPEC = ChaosSpec.parse("seed=3,drop=0.1,cut=0.2,corrupt=0.3,delay=8ms")


def test_faults_are_as_frequent_as_asked_for() -> None:
    drawn = fates(Chaos(SPEC, "decode-0", ["decode"]), "opened", 5000)
    assert 0.08 < sum(is_dropped for _, is_dropped, _ in drawn) / 5000 < 0.12
    assert 0.18 < sum(is_cut for _, _, is_cut in drawn) / 5000 < 0.22
    assert min(delay_s for delay_s, _, _ in drawn) >= 0.0
    assert 0.0079 < max(delay_s for delay_s, _, _ in drawn) <= 0.008
    chaos = Chaos(SPEC, "prefill-0", ["prefill"])
    bits = [chaos.damaged_bit(64) for _ in range(5000)]
    assert 0.27 < sum(bit is not None for bit in bits) / 5000 < 0.33
    assert {bit for bit in bits if bit is not None} == set(range(64))


@given(st.lists(st.sampled_from([*FRAMES, "corrupt"]), max_size=60))
def test_a_kind_meets_the_same_faults_whatever_is_between(kinds: list[str]) -> None:
    alone, among = (Chaos(SPEC, "prefill-0", ["prefill"]) for _ in range(2))
    expected = fates(alone, "push", kinds.count("push"))
    met = [(fate.delay_s, fate.is_dropped, fate.is_cut) for kind in kinds if (fate := among.fate(kind)) and kind == "push"]
    assert met == expected


def test_seeds_workers_and_kinds_differ() -> None:
    drawn = [
        fates(Chaos(ChaosSpec.parse(f"seed={seed},drop=0.5"), worker_id, ["decode"]), frame)
        for seed, worker_id, frame in [
            (1, "decode-0", "opened"),
            (2, "decode-0", "opened"),
            (1, "decode-1", "opened"),
            (1, "decode-0", "receipt"),
        ]
    ]
    assert all(a != b for index, a in enumerate(drawn) for b in drawn[index + 1 :])


def test_without_probabilities_nothing_happens() -> None:
    chaos = Chaos(ChaosSpec.parse("seed=1,kill=decode@push:1"), "prefill-0", ["prefill"])
    assert set(fates(chaos, "push")) == {(0.0, False, False)}
    assert all(chaos.damaged_bit(8) is None for _ in range(200))
    assert chaos.next("push") == Strikes(None, None), "that is for the other role"


@pytest.mark.parametrize("event", [*FRAMES, *STEPS])
@pytest.mark.parametrize("roles", [["decode"], ["prefill", "decode"]])
def test_a_strike_comes_once_at_its_moment(event: str, roles: list[str]) -> None:
    strike = Strike("decode", event, 2)
    chaos = Chaos(ChaosSpec(strikes=(strike,)), "decode-0", roles)
    assert [chaos.next(event) for _ in range(4)] == [Strikes(None, None), Strikes(strike, None), *[Strikes(None, None)] * 2]
    strike = Strike("decode", event, 1, after=True)
    chaos = Chaos(ChaosSpec(strikes=(strike,)), "decode-0", roles)
    assert [chaos.next(event) for _ in range(2)] == [Strikes(None, strike), Strikes(None, None)]
