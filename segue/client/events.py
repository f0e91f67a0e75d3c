"""What a stream of one request yields: Started, then Outputs as tokens are made, then one Completed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeVar

from google.protobuf.message import Message

from segue.sampling import FinishReason, GeneratedToken
from segue.v1 import inference_pb2 as pb
from segue.wire import finish_reason_from_pb, token_from_pb


@dataclass(frozen=True, slots=True)
class Started:
    """The router took the request. Comes again if the request had to be sent again before any output; a stream that is resumed
    after that does not show it."""

    request_id: str
    model: str
    num_prompt_tokens: int
    # The one given, or the one drawn.
    seed: int
    # When the router took the request; what chat templates write the date of.
    created_unix_s: int


@dataclass(frozen=True, slots=True)
class Output:
    """New text and tokens of one choice. `text` may lag behind `tokens` while a character or a possible stop string is
    incomplete; the texts of a choice, joined, are its whole answer. `finish_reason` is set on a choice's last output."""

    choice: int
    text: str
    tokens: tuple[GeneratedToken, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class RequestPath:
    """Which way one choice took, and where its time went; durations in seconds, as the router measured them."""

    prefill_worker: str
    # Empty when the first token was also the last.
    decode_worker: str
    # shm, tcp, local (both phases in one worker) or none.
    transport: str
    # Prompt tokens found in the prefix cache of each side.
    prefill_cached_tokens: int
    decode_cached_tokens: int
    # Prompt tokens that prefill fetched from decode, which had them from an earlier turn.
    prefill_pulled_tokens: int
    transferred_bytes: int
    # From arrival at the router to the first token.
    ttft_s: float
    # From the first token until decode held the verified KV cache.
    handover_s: float
    total_s: float
    attempts: int


@dataclass(frozen=True, slots=True)
class Completed:
    """The terminal event. `num_output_tokens` counts all choices; `paths` has one for each choice, in order."""

    num_prompt_tokens: int
    num_output_tokens: int
    paths: tuple[RequestPath, ...]


Event = Started | Output | Completed


Record = TypeVar("Record")


def copy_fields(record: type[Record], message: Message) -> Record:
    """A dataclass whose fields are scalars, from the message's fields of the same names."""
    return record(**{field.name: getattr(message, field.name) for field in fields(record)})  # type: ignore[arg-type]


def event_from_pb(message: pb.GenerateResponse) -> Event | None:
    """None for an event that this version does not know, which is to be ignored."""
    match message.WhichOneof("event"):
        case "started":
            return copy_fields(Started, message.started)
        case "output":
            return _output_from_pb(message.output)
        case "completed":
            completed = message.completed
            paths = tuple(copy_fields(RequestPath, path) for path in completed.paths)
            return Completed(completed.num_prompt_tokens, completed.num_output_tokens, paths)
        case _:
            return None


def _output_from_pb(output: pb.Output) -> Output:
    # A reason that a newer router added still ends the choice, by Completed; what it means cannot be said here.
    is_known = output.finish_reason in pb.FinishReason.values()
    return Output(
        choice=output.choice,
        text=output.text,
        tokens=tuple(map(token_from_pb, output.tokens)),
        finish_reason=finish_reason_from_pb(output.finish_reason) if is_known else None,
    )
