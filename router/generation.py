"""One client request: a prompt becomes `num_choices` sequences, their token steps become text.

    spec → choice 0 ────────────────→ token steps → detokenizer → stop strings ┐
           └ its first token          (the core)                               ├→ merged → ChoiceOutput … GenerationDone
             opens choices 1, 2, … ──→ token steps → detokenizer → stop strings ┘

The other choices wait for the first one's first token, so that its prompt is in the prefix cache when they start.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from router.merge import merge
from router.options import GenerationSpec
from router.sequence import SequencePath, SequenceServer, TokenStep
from router.text import StopStrings, Tokenizer
from segue.errors import InternalError, InvalidRequest
from segue.sampling import FinishReason, GeneratedToken


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """New text and tokens of one choice; the text may lag behind the tokens. The last one has a finish reason."""

    choice: int
    text: str
    tokens: tuple[GeneratedToken, ...]
    finish_reason: FinishReason | None = None
    # The client has it from a stream that broke: not to be sent again.
    is_seen: bool = False


@dataclass(frozen=True, slots=True)
class GenerationDone:
    """The last event: every choice has finished. `paths` are in the order of the choices."""

    num_prompt_tokens: int
    num_output_tokens: int
    paths: tuple[SequencePath, ...]

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that prefill did not compute for choice 0; the other choices reuse its prompt anyway."""
        return self.paths[0].prefill_cached_tokens + self.paths[0].prefill_pulled_tokens


GenerationEvent = ChoiceOutput | GenerationDone


async def generate(server: SequenceServer, tokenizer: Tokenizer, spec: GenerationSpec) -> AsyncGenerator[GenerationEvent, None]:
    """Outputs of all choices as they come, then one GenerationDone.

    Raises the SegueError of the first choice that fails, after closing the others. Closing or cancelling this closes all.
    """
    paths: dict[int, SequencePath] = {}
    first_token = asyncio.Event()
    choices = [_serve_choice(server, tokenizer, spec, choice, paths, first_token) for choice in range(spec.num_choices)]
    num_output_tokens = sum(len(seen.token_ids) if not seen.is_finished else seen.num_tokens for seen in spec.seen)
    async with aclosing(merge(choices)) as outputs:
        async for output in outputs:
            num_output_tokens += len(output.tokens)
            yield output
    in_order = tuple(path for _, path in sorted(paths.items()))
    yield GenerationDone(len(spec.prompt_token_ids), num_output_tokens, in_order)


async def _serve_choice(
    server: SequenceServer,
    tokenizer: Tokenizer,
    spec: GenerationSpec,
    choice: int,
    paths: dict[int, SequencePath],
    first_token: asyncio.Event,
) -> AsyncGenerator[ChoiceOutput, None]:
    if choice > 0:
        await first_token.wait()
    path = paths[choice] = SequencePath()
    request, seen = spec.sequence_of(choice), spec.seen_of(choice)
    if seen.is_finished:
        first_token.set()
        return
    text = _ChoiceText(tokenizer, spec)
    text.replay(seen.token_ids)
    num_untold = seen.num_untold
    async with aclosing(server.serve(request, path)) as steps:
        async for step in steps:
            first_token.set()
            for part in _split(step, num_untold):
                output = text.read(part, choice)
                yield replace(output, is_seen=True) if num_untold and output.finish_reason is None else output
                num_untold = max(num_untold - len(part.tokens), 0)
                if output.finish_reason is not None and part.finish_reason is None:
                    # A stop string: leaving closes the sequence.
                    return
    if not text.is_over:
        raise InternalError(f"sequence {request.sequence_id} ended without a finish reason")


def _split(step: TokenStep, num_tokens: int) -> tuple[TokenStep, ...]:
    """The step's first tokens, as many as are left of `num_tokens`, apart from the others."""
    if not 0 < num_tokens < len(step.tokens):
        return (step,)
    return TokenStep(step.tokens[:num_tokens]), replace(step, tokens=step.tokens[num_tokens:])


class _ChoiceText:
    """Turns the token steps of one choice into outputs."""

    def __init__(self, tokenizer: Tokenizer, spec: GenerationSpec) -> None:
        self._detokenizer = tokenizer.detokenizer(continues=spec.continues_text)
        self._stop = StopStrings(spec.stop)
        self._end_token_ids = frozenset(spec.sampling.stop_token_ids)
        self.is_over = False

    def replay(self, token_ids: Sequence[int]) -> None:
        """Comes to stand after these tokens, whose text the client has. Raises InvalidRequest when a stop string ends among
        them: the choice was over then, and the client knows."""
        for token_id in token_ids:
            self._stop.push(self._detokenizer.push((token_id,)))
        if self._stop.found:
            raise InvalidRequest("resume", "a choice has its stop string: it is finished")

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
