"""What a client may ask for, and the one place where defaults and limits are applied, for both APIs."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from router.caller import ANONYMOUS, Caller
from router.sequence import SequenceRequest
from segue.errors import InvalidRequest
from segue.sampling import SamplingParams

MAX_CHOICES = 16
MAX_PRIORITY = 100
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKEN_IDS = 256
_SEED_BITS = 64


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """None means that the client did not say."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    num_choices: int | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """The beginning of a choice that its client has already."""

    # The tokens, where the client can tell them: the choice goes on after them.
    token_ids: tuple[int, ...] = ()
    # Where it can only count them: so many are generated anew and not sent again.
    num_untold: int = 0
    # Its end came as well.
    is_finished: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_untold


NOTHING_SEEN = Seen()


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """Numbers of tokens and token ids that a request must keep to."""

    max_context: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """One prompt with everything decided. `sampling` is that of choice 0; the others differ in their seed alone."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    num_choices: int = 1
    stop: tuple[str, ...] = ()
    # The answer goes on where the prompt's text ends, so that its leading space counts.
    continues_text: bool = True
    # What the client has of each choice, from a stream that broke; choices of which it has nothing may be left out at the end.
    seen: tuple[Seen, ...] = ()
    caller: Caller = ANONYMOUS
    # On the running loop's clock.
    deadline_s: float | None = None

    def sequence_id(self, choice: int) -> str:
        return f"{self.request_id}-{choice}"

    def sequence_of(self, choice: int) -> SequenceRequest:
        return SequenceRequest(
            self.sequence_id(choice),
            self.prompt_token_ids,
            self.sampling_of(choice),
            self.seen_of(choice).token_ids,
            self.caller,
            self.deadline_s,
        )

    def seen_of(self, choice: int) -> Seen:
        return self.seen[choice] if choice < len(self.seen) else NOTHING_SEEN

    def sampling_of(self, choice: int) -> SamplingParams:
        return replace(self.sampling, seed=choice_seed(self.sampling.seed, choice))


def draw_seed() -> int:
    """For a request that has none."""
    return secrets.randbits(_SEED_BITS)


def choice_seed(seed: int, choice: int) -> int:
    """Choice 0 has the request's own seed; the others have one that depends on it and on their number alone."""
    if choice == 0:
        return seed
    text = seed.to_bytes(8, "little") + choice.to_bytes(4, "little")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"segue-choice").digest(), "little")


def build_spec(
    request_id: str,
    prompt_token_ids: Sequence[int],
    options: GenerationOptions,
    limits: ModelLimits,
    *,
    max_sequence_tokens: int | None,
    names: Mapping[str, str],
    continues_text: bool = True,
    seen: Sequence[Seen] = (),
    caller: Caller = ANONYMOUS,
    deadline_s: float | None = None,
) -> GenerationSpec:
    """Applies defaults, checks limits. Raises InvalidRequest.

    `max_sequence_tokens` is what the workers have KV memory for, None when that is unknown. `names` gives the client's name
    for a field (`prompt`, `num_choices`, `logprobs`, ...) where its API has another one.
    """
    try:
        if abs(caller.priority) > MAX_PRIORITY:
            raise InvalidRequest("priority", f"must be -{MAX_PRIORITY} to {MAX_PRIORITY}, not {caller.priority}")
        room = _check_prompt(prompt_token_ids, limits, max_sequence_tokens)
        _check_stop(options.stop)
        sampling, num_choices = _sampling(options, limits, room), _num_choices(options)
        _check_seen(seen, sampling, num_choices, limits)
        return GenerationSpec(
            request_id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            sampling=sampling,
            num_choices=num_choices,
            stop=options.stop,
            continues_text=continues_text,
            seen=tuple(seen),
            caller=caller,
            deadline_s=deadline_s,
        )
    except InvalidRequest as error:
        raise renamed(error, names) from None


def renamed(error: InvalidRequest, names: Mapping[str, str]) -> InvalidRequest:
    """The same problem, with the field called as the client calls it."""
    field_name = str(error.field)
    return InvalidRequest(names.get(field_name, field_name), error.message.removeprefix(f"{field_name}: "))


def _check_prompt(prompt_token_ids: Sequence[int], limits: ModelLimits, max_sequence_tokens: int | None) -> int:
    """The number of tokens that there is room for after the prompt, at least 1."""
    num_prompt = len(prompt_token_ids)
    if num_prompt == 0:
        raise InvalidRequest("prompt", "is empty; give at least one token")
    _check_token_ids("prompt", prompt_token_ids, limits)
    if num_prompt > limits.max_context - 1:
        raise InvalidRequest(
            "prompt", f"has {num_prompt} tokens; the context of {limits.max_context} leaves room for {limits.max_context - 1}"
        )
    if max_sequence_tokens is not None and num_prompt > max_sequence_tokens - 1:
        raise InvalidRequest(
            "prompt", f"has {num_prompt} tokens; the workers have KV memory for {max_sequence_tokens}, output included"
        )
    return min(limits.max_context, max_sequence_tokens or limits.max_context) - num_prompt


def _check_token_ids(name: str, token_ids: Sequence[int], limits: ModelLimits) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < limits.vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < limits.vocab_size)
        raise InvalidRequest(name, f"token id {wrong} is not in the vocabulary, 0 to {limits.vocab_size - 1}")


def _check_stop(stop: Sequence[str]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidRequest("stop", f"at most {MAX_STOP_STRINGS} strings, not {len(stop)}")
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest("stop", f"each string must have 1 to {MAX_STOP_CHARACTERS} characters, not {len(text)}")


def _check_seen(seen: Sequence[Seen], sampling: SamplingParams, num_choices: int, limits: ModelLimits) -> None:
    if len(seen) > num_choices:
        raise InvalidRequest("resume", f"has {len(seen)} choices, of {num_choices}")
    for choice, part in enumerate(seen):
        _check_token_ids("resume", part.token_ids, limits)
        if part.num_tokens > sampling.max_tokens:
            raise InvalidRequest("resume", f"choice {choice} has {part.num_tokens} tokens, of {sampling.max_tokens} at most")
        has_end = part.num_tokens == sampling.max_tokens or not set(sampling.stop_token_ids).isdisjoint(part.token_ids)
        if has_end and not part.is_finished:
            raise InvalidRequest("resume", f"choice {choice} has all its tokens: it is finished")


def _num_choices(options: GenerationOptions) -> int:
    number = 1 if options.num_choices is None else options.num_choices
    if not 1 <= number <= MAX_CHOICES:
        raise InvalidRequest("num_choices", f"must be 1 to {MAX_CHOICES}, not {number}")
    return number


def _sampling(options: GenerationOptions, limits: ModelLimits, room: int) -> SamplingParams:
    if options.max_tokens is not None and options.max_tokens > room:
        raise InvalidRequest("max_tokens", f"the prompt leaves room for {room} tokens, not {options.max_tokens}")
    for name, values, most in (
        ("logit_bias", options.logit_bias, MAX_LOGIT_BIASES),
        ("stop_token_ids", options.stop_token_ids, MAX_STOP_TOKEN_IDS),
    ):
        if len(values) > most:
            raise InvalidRequest(name, f"at most {most} token ids, not {len(values)}")
    _check_token_ids("logit_bias", list(options.logit_bias), limits)
    _check_token_ids("stop_token_ids", options.stop_token_ids, limits)
    end_token_ids = () if options.ignore_eos else limits.eos_token_ids
    given = {
        name: value
        for name in _PLAIN_OPTIONS
        # Not given: SamplingParams' own default holds.
        if (value := getattr(options, name)) is not None
    }
    return SamplingParams(
        max_tokens=room if options.max_tokens is None else options.max_tokens,
        seed=draw_seed() if options.seed is None else options.seed,
        logit_bias=dict(options.logit_bias),
        stop_token_ids=tuple(dict.fromkeys((*end_token_ids, *options.stop_token_ids))),
        **given,
    )


_PLAIN_OPTIONS = (
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "num_logprobs",
)
