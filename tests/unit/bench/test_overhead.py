from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.local_cluster import LocalCluster
from bench.overhead import Stopwatch, Timing, Timings, measure, rows, verdict
from bench.prompts import random_prompts
from bench.report import Report
from segue.client import Completed, Event, Output, RequestPath, Started
from segue.errors import ConfigError, InternalError
from segue.sampling import GeneratedToken

TOKEN = Output(0, "a", (GeneratedToken(1),), None)


def path(cached: int = 0, handover_s: float = 0.002) -> RequestPath:
    return RequestPath("p", "d", "shm", cached, 0, 0, 0, 0.1, handover_s, 0.5, 1)


@given(st.integers(1, 20), st.integers(1, 40), st.integers(20, 200), st.integers(0, 5))
@settings(max_examples=30)
def test_prompts_are_repeatable_and_begin_differently(num_prompts: int, num_tokens: int, vocab_size: int, seed: int) -> None:
    prompts = random_prompts(num_prompts, num_tokens, vocab_size, seed)
    assert prompts == random_prompts(num_prompts, num_tokens, vocab_size, seed)
    assert [len(prompt) for prompt in prompts] == [num_tokens] * num_prompts
    assert len({prompt[0] for prompt in prompts}) == num_prompts
    assert all(0 <= token_id < vocab_size for prompt in prompts for token_id in prompt)


def test_seeds_make_other_prompts_and_small_vocabularies_none() -> None:
    assert random_prompts(2, 8, 100, seed=1) != random_prompts(2, 8, 100, seed=2)
    with pytest.raises(ValueError, match="begin differently"):
        random_prompts(5, 8, 4)


def timed(events: list[Event], *times_s: float) -> Timing:
    clock = iter(times_s)
    watch = Stopwatch(lambda: next(clock))
    for event in events:
        watch.see(event)
    return watch.timing()


def test_a_stopwatch_times_tokens_and_not_text() -> None:
    text_alone = Output(0, "b", (), None)
    done = Completed(1, 3, (path(),))
    timing = timed([Started("r", "m", 1, 0, 0), TOKEN, text_alone, TOKEN, TOKEN, done], 1.0, 1.5, 1.75, 2.25)
    assert (timing.ttft_s, timing.gaps_s) == (0.5, (0.25, 0.5))


@pytest.mark.parametrize(
    ("events", "problem"),
    [
        ([TOKEN], "without"),
        ([Completed(1, 0, (path(),))], "without"),
    ],
)
def test_what_did_not_end_is_not_measured(events: list[Event], problem: str) -> None:
    with pytest.raises(InternalError, match=problem):
        timed(events, 0.0, 1.0)


class FakeClient:
    """Answers with one token; notes which prompts it got in a list that it shares."""

    def __init__(self, name: str, asked: list[tuple[str, int]], cached: int = 0) -> None:
        self._name = name
        self._asked = asked
        self._cached = cached

    async def stream(self, prompt: list[int], **_options: Any) -> Any:
        self._asked.append((self._name, prompt[0]))
        yield TOKEN
        yield Completed(1, 1, (path(self._cached),))


async def test_systems_take_turns_with_the_same_prompts_after_a_warm_up() -> None:
    asked: list[tuple[str, int]] = []
    clients: Any = (FakeClient("a", asked), FakeClient("b", asked))
    results = await measure(clients, [[0], [1], [2]], note=lambda text: None)
    assert asked == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [len(result.timings) for result in results] == [2, 2]


async def test_a_prompt_that_was_cached_is_not_measured() -> None:
    clients: Any = (FakeClient("a", [], cached=16),)
    with pytest.raises(InternalError, match="prefix cache"):
        await measure(clients, [[0], [1]], note=lambda text: None)


def test_rows_and_verdict() -> None:
    split = Timings([Timing(1.1, (0.05, 0.06), path(handover_s=0.004)), Timing(2.2, (0.07,), path(handover_s=0.006))])
    whole = Timings([Timing(1.0, (0.05,), path()), Timing(2.0, (0.05,), path())])
    made = {row.metric: row for row in rows(split, whole, 512)}
    assert made["ttft_disaggregated_over_colocated_512"].value == pytest.approx(1.1)
    assert made["ttft_disaggregated_ms_512"].value == pytest.approx(1650)
    assert made["handover_disaggregated_ms_512"].value == pytest.approx(5)
    assert made["inter_token_disaggregated_ms_512"].value == pytest.approx(60)
    assert made["inter_token_disaggregated_ms_512"].ratio_to["colocated"] == pytest.approx(1.2)
    slow = rows(Timings([Timing(1.2, (0.1,), path())]), Timings([Timing(1.0, (0.1,), path())]), 512)
    assert verdict(Report({}, "c", slow)).endswith("missed")
    assert verdict(Report({}, "c", rows(whole, whole, 512))).endswith("met")


async def test_a_cluster_refuses_bad_settings_and_unknown_workers() -> None:
    with pytest.raises(ConfigError, match="kv_memory"):
        LocalCluster("any", kv_memory="lots")
    with pytest.raises(ConfigError, match="no worker 'prefill-7'"):
        await LocalCluster("any").kill("prefill-7")
