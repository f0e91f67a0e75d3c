"""One request as several sequences: their order, their seeds, their ends."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.fake import FakeSequenceServer, ScriptItem, token_steps
from router.generation import ChoiceOutput, GenerationDone, generate
from router.merge import merge
from router.options import GenerationOptions, GenerationSpec, ModelLimits, Seen, build_spec, choice_seed
from router.sequence import SequenceRequest, TokenStep
from router.text import Tokenizer
from segue.errors import InternalError, InvalidRequest, WorkerLost
from segue.sampling import FinishReason, GeneratedToken

LIMITS = ModelLimits(max_context=512, vocab_size=400, eos_token_ids=(1,))


def spec_of(**options: Any) -> GenerationSpec:
    return build_spec("r", (5, 6), GenerationOptions(**options), LIMITS, max_sequence_tokens=None, names={})


async def texts_of(server: FakeSequenceServer, tokenizer: Tokenizer, spec: GenerationSpec) -> tuple[list[str], GenerationDone]:
    """The text of each choice; exactly one output of each has a finish reason, and it is the last."""
    outputs: dict[int, list[ChoiceOutput]] = {choice: [] for choice in range(spec.num_choices)}
    done = []
    async with aclosing(generate(server, tokenizer, spec)) as events:
        async for event in events:
            assert not done, "an event after the last"
            if isinstance(event, GenerationDone):
                done.append(event)
            else:
                outputs[event.choice].append(event)
    for of_choice in outputs.values():
        assert [output.finish_reason is not None for output in of_choice] == [False] * (len(of_choice) - 1) + [True]
    return ["".join(output.text for output in of_choice) for of_choice in outputs.values()], done[0]


def place_of(request: SequenceRequest) -> int:
    return int(request.sequence_id.rpartition("-")[2])


async def test_other_choices_start_after_the_first_token(tokenizer: Tokenizer) -> None:
    gate = asyncio.Event()

    def script(request: SequenceRequest) -> list[ScriptItem]:
        steps = token_steps(tokenizer.encode("fox"))
        return [gate, *steps] if place_of(request) == 0 else list(steps)

    server = FakeSequenceServer(script)
    task = asyncio.create_task(texts_of(server, tokenizer, spec_of(num_choices=3, seed=7)))
    await server.until(lambda core: len(core.active) == 1)
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(server.requests) == 1
    gate.set()
    texts, done = await task
    assert texts == ["fox"] * 3
    assert len(done.paths) == 3
    assert [request.sampling.seed for request in server.requests] == [7, choice_seed(7, 1), choice_seed(7, 2)]
    assert len(server.finished) == 3


def test_seeds_of_choices_are_stable_and_different() -> None:
    assert choice_seed(7, 0) == 7
    assert choice_seed(7, 1) == 15884440895337364705
    assert len({choice_seed(seed, choice) for seed in (0, 1, 2**64 - 1) for choice in range(16)}) == 48


def test_a_seed_is_drawn_when_none_is_given() -> None:
    assert len({spec_of().sampling.seed for _ in range(4)}) == 4


def test_defaults() -> None:
    spec = spec_of()
    assert (spec.num_choices, spec.stop, spec.sampling.max_tokens) == (1, (), 510)
    assert spec.sampling.stop_token_ids == (1,)
    assert (spec.sampling.temperature, spec.sampling.top_p, spec.sampling.repetition_penalty) == (1.0, 1.0, 1.0)


async def test_one_failing_choice_fails_all_and_closes_them(tokenizer: Tokenizer) -> None:
    never = asyncio.Event()

    def script(request: SequenceRequest) -> list[ScriptItem]:
        end: ScriptItem = WorkerLost("decode-1 died") if place_of(request) == 1 else never
        return [*token_steps(tokenizer.encode("fox"), None), end]

    server = FakeSequenceServer(script)
    with pytest.raises(WorkerLost, match="decode-1 died"):
        await texts_of(server, tokenizer, spec_of(num_choices=3))
    assert (server.failed, sorted(server.cancelled), server.active) == (["r-1"], ["r-0", "r-2"], set())


async def test_closing_closes_every_sequence(tokenizer: Tokenizer) -> None:
    never = asyncio.Event()
    server = FakeSequenceServer(lambda _: [*token_steps([5], None), never])
    events = generate(server, tokenizer, spec_of(num_choices=2))
    await anext(events)
    await anext(events)
    assert len(server.active) == 2
    await events.aclose()
    assert (sorted(server.cancelled), server.active) == (["r-0", "r-1"], set())


async def test_cancelling_closes_every_sequence(tokenizer: Tokenizer) -> None:
    never = asyncio.Event()
    server = FakeSequenceServer(lambda _: [*token_steps([5], None), never])
    task = asyncio.create_task(texts_of(server, tokenizer, spec_of(num_choices=2)))
    await server.until(lambda core: len(core.active) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (sorted(server.cancelled), server.active) == (["r-0", "r-1"], set())


async def test_an_end_without_a_reason_is_a_defect(tokenizer: Tokenizer) -> None:
    with pytest.raises(InternalError, match="without a finish reason"):
        await texts_of(FakeSequenceServer(lambda _: token_steps([5], None)), tokenizer, spec_of())


@given(data=st.data())
@settings(max_examples=60, deadline=None)
async def test_stop_strings_do_not_depend_on_steps(data: st.DataObject, tokenizer: Tokenizer) -> None:
    """However tokens are bundled into steps, a stop string cuts at the same place and the same tokens are counted."""
    token_ids = tokenizer.encode("the answer is 世界, is it 世?")
    stop = tuple(data.draw(st.lists(st.sampled_from(["界", "is it", "世?", "wer i", "nowhere"]), max_size=3)))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(token_ids) - 1))))
    bounds = [0, *cuts, len(token_ids)]

    def bundled(_: SequenceRequest) -> list[TokenStep]:
        steps = [tuple(map(GeneratedToken, token_ids[a:b])) for a, b in itertools.pairwise(bounds)]
        last = len(steps) - 1
        return [TokenStep(tokens, FinishReason.LENGTH if i == last else None) for i, tokens in enumerate(steps)]

    spec = spec_of(stop=stop)
    one_by_one = await texts_of(FakeSequenceServer(lambda _: token_steps(token_ids)), tokenizer, spec)
    in_bundles = await texts_of(FakeSequenceServer(bundled), tokenizer, spec)
    assert one_by_one[0] == in_bundles[0]
    assert one_by_one[1].num_output_tokens == in_bundles[1].num_output_tokens
    text = "the answer is 世界, is it 世?"
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert one_by_one[0] == [text[: min(ends)[1]] if ends else text]


async def test_a_stop_string_closes_the_sequence(tokenizer: Tokenizer) -> None:
    server = FakeSequenceServer(lambda _: token_steps(tokenizer.encode("one STOP two")))
    texts, done = await texts_of(server, tokenizer, spec_of(stop=("STOP",)))
    assert (texts, server.cancelled, server.active) == (["one "], ["r-0"], set())
    assert done.num_output_tokens < len(tokenizer.encode("one STOP two"))


async def test_text_held_back_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    """A beginning of a stop string, and a character that never became complete."""
    held = FakeSequenceServer(lambda _: token_steps(tokenizer.encode("one STO")))
    assert (await texts_of(held, tokenizer, spec_of(stop=("STOP",))))[0] == ["one STO"]
    broken = FakeSequenceServer(lambda _: token_steps(tokenizer.encode("世")[:2]))
    assert (await texts_of(broken, tokenizer, spec_of()))[0] == ["�"]


async def test_a_stop_token_shows_no_text_but_counts(tokenizer: Tokenizer) -> None:
    [fox] = tokenizer.encode("f")
    server = FakeSequenceServer(lambda _: token_steps([*tokenizer.encode("the "), fox], FinishReason.STOP))
    texts, done = await texts_of(server, tokenizer, spec_of(stop_token_ids=(fox,)))
    assert texts == ["the "]
    assert done.num_output_tokens == len(tokenizer.encode("the ")) + 1


async def count_to(number: int, closed: list[int]) -> AsyncGenerator[int, None]:
    try:
        for place in range(number):
            await asyncio.sleep(0)
            yield place
        if number == 3:
            raise WorkerLost("three")
    finally:
        closed.append(number)


@pytest.mark.parametrize("numbers", [[2], [2, 0, 5], [0, 0], [1, 1, 1, 1]])
async def test_merge_gives_every_item_and_closes_all(numbers: list[int]) -> None:
    closed: list[int] = []
    items = [item async for item in merge([count_to(number, closed) for number in numbers])]
    assert sorted(items) == sorted(place for number in numbers for place in range(number))
    assert sorted(closed) == sorted(numbers)


async def test_merge_raises_the_first_failure() -> None:
    closed: list[int] = []
    with pytest.raises(WorkerLost):
        _ = [item async for item in merge([count_to(number, closed) for number in (9, 3, 9)])]
    assert sorted(closed) == [3, 9, 9]


@settings(deadline=None, max_examples=60)
@given(st.data())
async def test_an_answer_goes_on_where_its_stream_broke(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Cut anywhere, in tokens or only counted, the texts before and after the cut are the whole, and so are the usages."""
    text = data.draw(st.text(alphabet="abé🙂 \n", min_size=2, max_size=12))
    token_ids = tokenizer.encode(text)
    stop = data.draw(st.lists(st.text(alphabet="abé🙂 ", min_size=1, max_size=3), max_size=2))
    spec = spec_of(seed=3, stop=tuple(stop), max_tokens=len(token_ids))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=len(token_ids), max_size=len(token_ids)))

    def script(request: SequenceRequest) -> list[ScriptItem]:
        rest, steps = token_ids[len(request.output_token_ids) :], list[ScriptItem]()
        for size in sizes:
            if rest:
                is_last = size >= len(rest)
                tokens = tuple(GeneratedToken(token_id) for token_id in rest[:size])
                steps.append(TokenStep(tokens, FinishReason.LENGTH if is_last else None))
                rest = rest[size:]
        return steps

    server = FakeSequenceServer(script)
    outputs = [event async for event in generate(server, tokenizer, spec)]
    done = outputs.pop()
    choice_outputs = [output for output in outputs if isinstance(output, ChoiceOutput)]
    cut = data.draw(st.integers(0, len(choice_outputs) - 1))
    had, missing = choice_outputs[:cut], choice_outputs[cut:]
    tokens = tuple(token.token_id for output in had for token in output.tokens)
    seen = data.draw(st.sampled_from([Seen(tokens), Seen(num_untold=len(tokens))]))
    again = [event async for event in generate(server, tokenizer, replace(spec, seen=(seen,)))]
    done_again = again.pop()
    new = [event for event in again if isinstance(event, ChoiceOutput) and not event.is_seen]
    assert "".join(event.text for event in new) == "".join(event.text for event in missing)
    assert [t for event in new for t in event.tokens] == [t for event in missing for t in event.tokens]
    assert new[-1].finish_reason == missing[-1].finish_reason
    assert isinstance(done, GenerationDone)
    assert isinstance(done_again, GenerationDone)
    assert done_again.num_output_tokens == done.num_output_tokens


async def test_a_choice_that_is_finished_is_not_served_again(tokenizer: Tokenizer) -> None:
    server = FakeSequenceServer(lambda request: token_steps(tokenizer.encode("fox")[len(request.output_token_ids) :]))
    finished = Seen(tuple(tokenizer.encode("fox")), is_finished=True)
    spec = replace(spec_of(num_choices=2, seed=7), seen=(finished,))
    events = [event async for event in generate(server, tokenizer, spec)]
    assert [request.sequence_id for request in server.requests] == ["r-1"]
    assert {event.choice for event in events if isinstance(event, ChoiceOutput)} == {1}
    assert isinstance(events[-1], GenerationDone)
    assert events[-1].num_output_tokens == 2 * len(tokenizer.encode("fox"))


@pytest.mark.parametrize(
    ("seen", "problem"),
    [
        ([Seen(), Seen()], "has 2 choices, of 1"),
        ([Seen((400,))], "token id 400"),
        ([Seen((5,) * 9)], "has 9 tokens, of 8"),
        ([Seen((5,) * 8)], "has all its tokens"),
        ([Seen((5, 1))], "has all its tokens"),
    ],
)
def test_what_cannot_have_been_seen_is_refused(seen: list[Seen], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as caught:
        build_spec("r", (5, 6), GenerationOptions(max_tokens=8), LIMITS, max_sequence_tokens=None, names={}, seen=seen)
    assert caught.value.field == "resume"


async def test_a_stop_string_that_was_seen_is_refused(tokenizer: Tokenizer) -> None:
    spec = replace(spec_of(stop=("fox",)), seen=(Seen(tuple(tokenizer.encode("a fox b"))),))
    with pytest.raises(InvalidRequest, match="it is finished"):
        await anext(generate(FakeSequenceServer(lambda _: []), tokenizer, spec))
