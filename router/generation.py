"""One client request: a prompt becomes `num_choices` sequences, their token steps become text.

    spec → choice 0 ────────────────→ token steps → detokenizer → stop strings ┐
           └ its first token          (the core)                               ├→ merged → ChoiceOutput … GenerationDone
             opens choices 1, 2, … ──→ token steps → detokenizer → stop strings ┘

The other choices wait for the first one's first token, so that its prompt is in the prefix cache when they start.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from router.merge import merge
from router.options import GenerationSpec
from router.sequence import SequencePath, SequenceServer, TokenStep
from router.text import StopStrings, Tokenizer
from segue.errors import InternalError
from segue.sampling import FinishReason, GeneratedToken
from segue.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """New text and tokens of one choice; the text may lag behind the tokens. The last one has a finish reason."""

    choice: int
    text: str
    tokens: tuple[GeneratedToken, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class GenerationDone:
    """The last event: every choice has finished. `paths` are in the order of the choices."""

    num_prompt_tokens: int
    num_output_tokens: int
    paths: tuple[SequencePath, ...]

    def paths_to_pb(self) -> list[pb.RequestPath]:
        return [path.to_pb(self.paths[0].begun_s) for path in self.paths]

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that prefill did not compute for choice 0; the other choices reuse its prompt anyway."""
        return self.paths[0].prefill_cached_tokens + self.paths[0].prefill_pulled_tokens


GenerationEvent = ChoiceOutput | GenerationDone


async def generate(
    server: SequenceServer, tokenizer: Tokenizer, spec: GenerationSpec, paths: dict[str, SequencePath]
) -> AsyncGenerator[GenerationEvent, None]:
    """Outputs of all choices as they come, then one GenerationDone. Each choice that begins leaves its path in `paths`, by
    the id of its sequence.

    Raises the SegueError of the first choice that fails, after closing the others. Closing or cancelling this closes all.
    """
    first_token = asyncio.Event()
    choices = [_serve_choice(server, tokenizer, spec, choice, paths, first_token) for choice in range(spec.num_choices)]
    num_output_tokens = 0
    async with aclosing(merge(choices)) as outputs:
        async for output in outputs:
            num_output_tokens += len(output.tokens)
            yield output
    in_order = tuple(paths[spec.sequence_id(choice)] for choice in range(spec.num_choices))
    yield GenerationDone(len(spec.prompt_token_ids), num_output_tokens, in_order)


async def _serve_choice(
    server: SequenceServer,
    tokenizer: Tokenizer,
    spec: GenerationSpec,
    choice: int,
    paths: dict[str, SequencePath],
    first_token: asyncio.Event,
) -> AsyncGenerator[ChoiceOutput, None]:
    if choice > 0:
        await first_token.wait()
    path = paths[spec.sequence_id(choice)] = SequencePath()
    request = spec.sequence_of(choice)
    text = _ChoiceText(tokenizer, spec)
    async with aclosing(server.serve(request, path)) as steps:
        async for step in steps:
            first_token.set()
            output = text.read(step, choice)
            yield output
            if output.finish_reason is not None and step.finish_reason is None:
                # A stop string: leaving closes the sequence.
                return
    if not text.is_over:
        raise InternalError(f"sequence {request.sequence_id} ended without a finish reason")


class _ChoiceText:
    """Turns the token steps of one choice into outputs."""

    def __init__(self, tokenizer: Tokenizer, spec: GenerationSpec) -> None:
        self._detokenizer = tokenizer.detokenizer(continues=spec.continues_text)
        self._stop = StopStrings(spec.stop)
        self._end_token_ids = frozenset(spec.sampling.stop_token_ids)
        self.is_over = False

    def read(self, step: TokenStep, choice: int) -> ChoiceOutput:
        """Tokens that came after the one that completed a stop string are dropped, and not counted."""
        pieces = []
        for count, token in enumerate(step.tokens, start=1):
            if not (step.finish_reason is FinishReason.STOP and token.token_id in self._end_token_ids):
                pieces.append(self._stop.push(self._detokenizer.push((token.token_id,))))
            if self._stop.found:
                return self._output(choice, pieces, step.tokens[:count], FinishReason.STOP)
        if step.finish_reason is None:
            return ChoiceOutput(choice, "".join(pieces), step.tokens)
        pieces += (self._stop.push(self._detokenizer.finish()), self._stop.finish())
        return self._output(choice, pieces, step.tokens, FinishReason.STOP if self._stop.found else step.finish_reason)

    def _output(
        self, choice: int, pieces: list[str], tokens: tuple[GeneratedToken, ...], finish_reason: FinishReason
    ) -> ChoiceOutput:
        self.is_over = True
        return ChoiceOutput(choice, "".join(pieces), tokens, finish_reason)
