"""A whole answer, gathered from the events of its stream."""

from __future__ import annotations

from dataclasses import dataclass, field

from segue.client.events import Completed, Event, Output, RequestPath, Started
from segue.errors import InternalError
from segue.sampling import FinishReason, GeneratedToken


@dataclass(frozen=True, slots=True)
class Usage:
    num_prompt_tokens: int
    # Over all choices.
    num_output_tokens: int

    @property
    def num_total_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_output_tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """One continuation. `finish_reason` is None only for a reason that this client is too old to know."""

    index: int
    text: str
    tokens: tuple[GeneratedToken, ...]
    finish_reason: FinishReason | None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.tokens)

    @property
    def logprobs(self) -> tuple[float, ...] | None:
        """One for each token, when `num_logprobs` was asked for."""
        known = tuple(token.logprob for token in self.tokens if token.logprob is not None)
        return known if len(known) == len(self.tokens) and known else None


@dataclass(frozen=True, slots=True)
class Generation:
    """The whole answer to one request; `paths` has one for each choice, in order."""

    request_id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    paths: tuple[RequestPath, ...]

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first choice's tokens."""
        return self.choices[0].token_ids

    @property
    def path(self) -> RequestPath:
        """The first choice's path."""
        return self.paths[0]


@dataclass(slots=True)
class _ChoiceParts:
    texts: list[str] = field(default_factory=list)
    tokens: list[GeneratedToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def to_choice(self, index: int) -> Choice:
        return Choice(index, "".join(self.texts), tuple(self.tokens), self.finish_reason)


class GenerationBuilder:
    """Takes the events of one stream, in order, and gives the whole answer once the last has come."""

    def __init__(self) -> None:
        self._started: Started | None = None
        self._completed: Completed | None = None
        self._parts: dict[int, _ChoiceParts] = {}

    def add(self, event: Event) -> None:
        match event:
            case Started():
                self._started = event
            case Output():
                parts = self._parts.setdefault(event.choice, _ChoiceParts())
                parts.texts.append(event.text)
                parts.tokens.extend(event.tokens)
                parts.finish_reason = event.finish_reason or parts.finish_reason
            case Completed():
                self._completed = event

    def build(self) -> Generation:
        """Raises InternalError when the events were not those of a whole request."""
        if self._started is None or self._completed is None or not self._parts:
            raise InternalError("the router's answer lacks its start, its output or its end")
        return Generation(
            request_id=self._started.request_id,
            model=self._started.model,
            choices=tuple(parts.to_choice(index) for index, parts in sorted(self._parts.items())),
            usage=Usage(self._completed.num_prompt_tokens, self._completed.num_output_tokens),
            paths=self._completed.paths,
        )
