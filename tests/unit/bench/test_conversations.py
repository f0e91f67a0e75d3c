from __future__ import annotations

from typing import Any

import pytest

from bench.conversations import SYSTEMS, Turn, converse, rows
from segue.client import Completed, Output, RequestPath
from segue.sampling import GeneratedToken


class FakeClient:
    """Answers each prompt with its length and a 7, knowing all but the last 5 tokens of it."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    async def stream(self, prompt: list[int], **_options: Any) -> Any:
        self.prompts.append(list(prompt))
        yield Output(0, "", (GeneratedToken(len(prompt)), GeneratedToken(7)), None)
        yield Completed(1, 2, (RequestPath("p", "d", "shm", len(prompt) - 6, 0, 1, 0, 0.1, 0.002, 0.5, 1),))


async def test_each_prompt_is_all_that_was_said_and_something_new() -> None:
    client: Any = FakeClient()
    turns = await converse(client, [[1, 2, 3, 4, 5, 6], [8, 9]], 2)
    assert client.prompts == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 6, 7, 8, 9]]
    assert [(turn.num_prompt_tokens, turn.num_computed_tokens) for turn in turns] == [(6, 5), (10, 5)]


def test_rows_compare_each_turn() -> None:
    results = {name: [[Turn(64, 64, 1.0), Turn(256, 64 * (1 + place), 1.0 + place)]] for place, name in enumerate(SYSTEMS)}
    made = {row.metric: row for row in rows(results)}
    assert list(made) == ["turn1_64_prefilled", "turn1_64_ttft", "turn2_256_prefilled", "turn2_256_ttft"]
    assert (made["turn2_256_prefilled"].value, made["turn2_256_ttft"].value) == (64, 1000)
    assert made["turn2_256_prefilled"].ratio_to == pytest.approx({"recomputing": 1 / 2, "colocated": 1 / 3})
