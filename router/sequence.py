"""What the front of the router (HTTP, gRPC) and its core (the coordinator) say to each other: tokens in, tokens out.

The front turns a client's request into one SequenceRequest for each choice, and token steps into text. The core knows nothing
of text; the front knows nothing of workers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from router.caller import ANONYMOUS, Caller
from router.timeline import AttemptTiming, attempt_timings
from segue.errors import SegueError
from segue.lifecycle import Lifecycle, Phase
from segue.sampling import FinishReason, GeneratedToken, SamplingParams
from segue.v1 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One choice of one request, checked against the model's limits."""

    sequence_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    # Tokens of the answer that were generated before; serving goes on after them. max_tokens counts them.
    output_token_ids: tuple[int, ...] = ()
    caller: Caller = ANONYMOUS
    # On the running loop's clock; None: the router's own limit.
    deadline_s: float | None = None


def attempt_name(sequence_id: str, attempt: int) -> str:
    """Names the attempt's span among those of its request; attempts count from 1."""
    return f"{sequence_id} {attempt}"


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """Workers that could not serve a sequence (to its end), and why."""

    prefill_worker: str
    decode_worker: str
    error: SegueError


@dataclass(slots=True)
class SequencePath:
    """Filled in while the sequence is served: which way it took. Workers, transport, numbers: those of the last attempt."""

    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    prefill_worker: str = ""
    decode_worker: str = ""
    transport: str = "none"
    # Why these workers, in a word of router.policies.
    placement: str = ""
    prefill_cached_tokens: int = 0
    prefill_pulled_tokens: int = 0
    decode_cached_tokens: int = 0
    transferred_bytes: int = 0
    # Of the time to the first token: how long the prompt waited on the prefill worker, and how long KV travelled already.
    prefill_queue_s: float = 0.0
    transfer_hidden_s: float = 0.0
    failed_attempts: list[FailedAttempt] = field(default_factory=list)
    # What the last attempt failed with, for good.
    error: SegueError | None = None

    @property
    def attempts(self) -> int:
        return len(self.failed_attempts) + 1

    @property
    def begun_s(self) -> float:
        """On the lifecycle's clock."""
        return self.lifecycle.history[0][1]

    def to_pb(self, request_begun_s: float | None = None) -> pb.RequestPath:
        """`request_begun_s`: when the first choice began, on the lifecycle's clock, if that is not this one."""
        seconds = self.lifecycle.seconds
        return pb.RequestPath(
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
            transport=self.transport,
            prefill_cached_tokens=self.prefill_cached_tokens,
            prefill_pulled_tokens=self.prefill_pulled_tokens,
            decode_cached_tokens=self.decode_cached_tokens,
            transferred_bytes=self.transferred_bytes,
            ttft_s=seconds(Phase.QUEUED, Phase.TRANSFERRING) or 0.0,
            handover_s=seconds(Phase.TRANSFERRING, Phase.DECODING) or 0.0,
            # A stop string ends a sequence from outside: for the workers that is a cancellation.
            total_s=(seconds(Phase.QUEUED, self.lifecycle.phase) if self.lifecycle.is_over else None) or 0.0,
            attempts=self.attempts,
            placement=self.placement,
            start_s=0.0 if request_begun_s is None else self.begun_s - request_begun_s,
            timeline=self._timeline(),
        )

    def _timeline(self) -> list[pb.Attempt]:
        timings = attempt_timings(self.lifecycle.history, self.lifecycle.clock())
        *failed, last = timings
        attempts = [
            _attempt_to_pb(timing, attempt.prefill_worker, attempt.decode_worker, attempt.error)
            for timing, attempt in zip(failed, self.failed_attempts, strict=True)
        ]
        own = _attempt_to_pb(last, self.prefill_worker, self.decode_worker, self.error)
        own.prefill_queue_s, own.transfer_hidden_s = self.prefill_queue_s, self.transfer_hidden_s
        return [*attempts, own]


def _attempt_to_pb(timing: AttemptTiming, prefill: str, decode: str, error: SegueError | None) -> pb.Attempt:
    return pb.Attempt(
        prefill_worker=prefill,
        decode_worker=decode,
        start_s=timing.start_s,
        queue_s=timing.queue_s,
        reserve_s=timing.reserve_s,
        prefill_s=timing.prefill_s,
        transfer_exposed_s=timing.exposed_s,
        decode_s=timing.decode_s,
        error_code=error.code if error is not None else "",
        error=error.message if error is not None else "",
    )


@dataclass(frozen=True, slots=True)
class TokenStep:
    """Tokens that came in one message; `finish_reason` is set on the last step of a sequence."""

    tokens: tuple[GeneratedToken, ...]
    finish_reason: FinishReason | None = None


class SequenceServer(Protocol):
    """The core, as the front sees it."""

    def serve(self, request: SequenceRequest, path: SequencePath) -> AsyncGenerator[TokenStep, None]:
        """Token steps until one carries a finish reason. Raises a SegueError when the sequence cannot be (further) served;
        closing the generator early cancels it and frees what it held on both workers."""

    def status(self) -> pb.GetClusterStatusResponse:
        """The cluster as this router sees it now."""

    def missing_roles(self) -> list[str]:
        """Roles (prefill, decode) that no live worker has; empty when a request can be served."""

    @property
    def max_sequence_tokens(self) -> int | None:
        """The longest prompt plus output that some pair of workers has KV memory for; None when there are no workers."""
