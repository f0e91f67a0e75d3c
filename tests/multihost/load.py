"""`python -m tests.multihost.load ADDRESS FILE`: clients that ask without end, from the host that it runs on.

FILE has pairs of prompt and expected answer, as token ids. One line of JSON for each request that ended; ends when stdin does.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from segue import AsyncClient, RetryPolicy
from segue.errors import SegueError

NUM_CLIENTS = 4


@dataclass(frozen=True, slots=True)
class Ending:
    # Empty, or what a client would have seen.
    error: str
    prefill: str = ""
    decode: str = ""
    transport: str = ""
    attempts: int = 0


async def main(address: str, expected: str) -> None:
    pairs = itertools.cycle([(tuple(prompt), tuple(answer)) for prompt, answer in json.loads(expected)])
    async with AsyncClient(address, retry=RetryPolicy(max_attempts=1)) as client:
        stop = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
        await asyncio.gather(*(_ask_until(stop, client, pairs) for _ in range(NUM_CLIENTS)))


async def _ask_until(
    stop: asyncio.Task[str], client: AsyncClient, pairs: Iterator[tuple[tuple[int, ...], tuple[int, ...]]]
) -> None:
    while not stop.done():
        sys.stdout.write(json.dumps(asdict(await _ask(client, *next(pairs)))) + "\n")
        sys.stdout.flush()


async def _ask(client: AsyncClient, prompt: tuple[int, ...], expected: tuple[int, ...]) -> Ending:
    try:
        answer = await client.generate(list(prompt), max_tokens=len(expected), temperature=0.0, ignore_eos=True)
    except SegueError as error:
        return Ending(f"{type(error).__name__}: {error.message}")
    path = answer.path
    error = "" if answer.token_ids == expected else f"wrong tokens {answer.token_ids} for {prompt}, not {expected}"
    return Ending(error, path.prefill_worker, path.decode_worker, path.transport, path.attempts)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], Path(sys.argv[2]).read_text()))
