"""Requests whose right answers are known, for clusters in which things go wrong."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pytest

from bench.nursery import Nursery, running_nursery
from deploy.valkey import Valkey
from segue import AsyncClient, Completed, GenerateOptions, Output
from segue.errors import SegueError
from tests.support.cluster import in_process_cluster
from tests.support.tiny_model import make_tiny_model

NUM_TOKENS = 8
# So long that prefill, in the next turn, fetches what decode knows of the answer.
NUM_TOKENS_IN_FIRST_TURN = 24
OPTIONS = GenerateOptions(temperature=0.0, ignore_eos=True)
Prompt = tuple[int, ...]
Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ending:
    """The one end of a request: its error, or none. It may have been left before."""

    tokens: Tokens
    error: SegueError | None
    was_left: bool = False
    num_attempts: int = 0


class Requests:
    """Prompts in endless turn, more than the prefix caches hold, with the tokens that a cluster without faults answers."""

    def __init__(self, short: Sequence[Prompt], long: Sequence[Prompt], expected: dict[Prompt, Tokens]) -> None:
        self._expected = expected
        self.short: Iterator[Prompt] = cycle(short)
        self.long: Iterator[Prompt] = cycle(long)

    async def talk(self, client: AsyncClient) -> Ending:
        """Two turns of a conversation, if the first ends well."""
        prompt = next(self.short)
        ending = await self.ask(client, prompt, num_tokens=NUM_TOKENS_IN_FIRST_TURN)
        return ending if ending.error else await self.ask(client, next_turn(prompt, ending.tokens))

    async def ask(
        self, client: AsyncClient, prompt: Prompt, *, num_tokens: int = NUM_TOKENS, leave_after_s: float | None = None
    ) -> Ending:
        """Sends a request and reads to its end. Fails on a wrong token, a second end, or an error that is no passing one."""
        tokens: list[int] = []
        completed = False
        num_attempts = 0
        try:
            async with asyncio.timeout(leave_after_s), client.stream(list(prompt), max_tokens=num_tokens, **OPTIONS) as stream:
                async for event in stream:
                    assert not completed, "nothing comes after the end"
                    if completed := isinstance(event, Completed):
                        num_attempts = event.paths[0].attempts
                    tokens += [token.token_id for token in event.tokens] if isinstance(event, Output) else []
        except TimeoutError:
            return Ending(tuple(tokens), None, was_left=True)
        except SegueError as error:
            ending = Ending(tuple(tokens), error)
        else:
            ending = Ending(tuple(tokens), None, num_attempts=num_attempts)
        assert completed == (ending.error is None)
        assert ending.error is None or ending.error.retryable, ending.error
        assert ending.tokens == self._expected[prompt][: num_tokens if completed else len(tokens)], prompt
        return ending


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
async def nursery() -> AsyncIterator[Nursery]:
    async with running_nursery() as nursery:
        yield nursery


@pytest.fixture(scope="session")
async def requests(valkey: Valkey, tiny_model_dir: Path) -> Requests:
    chance = random.Random(11)
    short = [tuple(chance.randrange(3, 259) for _ in range(chance.randrange(3, 60))) for _ in range(40)]
    long = [tuple(chance.randrange(3, 259) for _ in range(chance.randrange(200, 400))) for _ in range(8)]
    async with in_process_cluster(valkey.url, tiny_model_dir, colocated=True) as cluster:

        async def answer(prompt: Prompt) -> Tokens:
            return (await cluster.client.generate(list(prompt), max_tokens=NUM_TOKENS_IN_FIRST_TURN, **OPTIONS)).token_ids

        async def answers(prompts: Sequence[Prompt]) -> dict[Prompt, Tokens]:
            return dict(zip(prompts, await asyncio.gather(*map(answer, prompts)), strict=True))

        expected = await answers([*short, *long])
        expected |= await answers([next_turn(prompt, expected[prompt]) for prompt in short])
    return Requests(short, long, expected)


def next_turn(prompt: Prompt, answer: Tokens) -> Prompt:
    return (*prompt, *answer, 7, 8, 9)
