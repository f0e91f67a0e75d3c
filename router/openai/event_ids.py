"""The `id` of a server-sent event: enough to go on after it, on any router, with the same body and the header Last-Event-ID.

    3f2a...:1767225600:1234567:17.4e
                      the answer's id and time, the seed, the number of tokens of each choice; `e` after the end of one

Tokens are not in it, so what came before is generated anew and not sent: the same tokens, since seed and prompt are the same.
(The time is in the prompt where the model's chat template writes the date.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from router.generation import ChoiceOutput
from router.options import MAX_CHOICES, GenerationSpec, Seen
from segue.errors import InvalidRequest

_PATTERN = re.compile(r"(?P<answer>[0-9a-f]{24}):(?P<created>\d{1,10}):(?P<seed>\d{1,20}):(?P<seen>\d{1,9}e?(?:\.\d{1,9}e?)*)")
_LONGEST = 2**15
LAST_EVENT_ID = "Last-Event-ID"


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a stream broke. `seen` has one for each choice of each prompt, in order."""

    answer_id: str
    created_unix_s: int
    seed: int
    seen: tuple[Seen, ...]

    @classmethod
    def parse(cls, event_id: str) -> ResumePoint:
        """Raises InvalidRequest."""
        match = _PATTERN.fullmatch(event_id) if len(event_id) <= _LONGEST else None
        if match is None or int(match["seed"]) >= 2**64 or int(match["created"]) >= 2**32:
            raise InvalidRequest(LAST_EVENT_ID, "is no id of an event of this API; send it as it came, or leave it out")
        counts = match["seen"].split(".")
        seen = tuple(Seen(num_untold=int(count.rstrip("e")), is_finished=count.endswith("e")) for count in counts)
        return cls(match["answer"], int(match["created"]), int(match["seed"]), seen)

    def of_prompt(self, prompt: int, num_prompts: int, num_choices: int | None) -> tuple[Seen, ...]:
        """Raises InvalidRequest when the id is that of another request: it does not have so many choices."""
        size = num_choices or 1
        if not 1 <= size <= MAX_CHOICES or len(self.seen) != num_prompts * size:
            raise InvalidRequest(LAST_EVENT_ID, f"is that of an answer of {len(self.seen)} choices, not {num_prompts * size}")
        return self.seen[prompt * size : (prompt + 1) * size]


class EventIds:
    """Counts what goes out, over all choices of one answer."""

    def __init__(self, answer_id: str, created_unix_s: int, seed: int, specs: Sequence[GenerationSpec]) -> None:
        """`specs`: one for each prompt."""
        self._prefix = f"{answer_id}:{created_unix_s}:{seed}:"
        self._num_choices = specs[0].num_choices
        seen = [spec.seen_of(choice) for spec in specs for choice in range(self._num_choices)]
        self._num_tokens = [0] * len(seen)
        # Of a choice that was finished before, nothing more comes.
        self._counts = [f"{part.num_untold}{'e' if part.is_finished else ''}" for part in seen]

    def note(self, prompt: int, output: ChoiceOutput) -> None:
        place = prompt * self._num_choices + output.choice
        self._num_tokens[place] += len(output.tokens)
        if output.is_seen:
            # The client has more than was computed again so far.
            return
        end = "" if output.finish_reason is None else "e"
        self._counts[place] = f"{self._num_tokens[place]}{end}"

    def last(self) -> str:
        """The id after all that was noted."""
        return self._prefix + ".".join(self._counts)
