"""A router whose answers are written down beforehand, served for real over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import pytest

from segue.errors import SegueError, WorkerLost
from segue.v1 import inference_pb2 as pb
from segue.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from segue.v1.operator_pb2_grpc import OperatorServiceServicer, add_OperatorServiceServicer_to_server

HOLD = object()
"""In a script: send nothing more until the client goes away."""

STARTED = pb.GenerateResponse(started=pb.Started(request_id="r-1", model="tiny", num_prompt_tokens=3))
PATH = pb.RequestPath(
    prefill_worker="prefill-0", decode_worker="decode-0", transport="shm", ttft_s=0.5, handover_s=0.25, attempts=1
)
COMPLETED = pb.GenerateResponse(completed=pb.Completed(num_prompt_tokens=3, num_output_tokens=2, paths=[PATH]))


def output(
    text: str, *token_ids: int, choice: int = 0, finish: Any = None, logprob: float | None = None
) -> pb.GenerateResponse:
    tokens = [pb.Token(id=token_id, logprob=logprob) for token_id in token_ids]
    return pb.GenerateResponse(output=pb.Output(choice=choice, text=text, tokens=tokens, finish_reason=finish))


WHOLE_ANSWER = [STARTED, output("Hel", 7), output("lo", 8, finish=pb.FINISH_REASON_LENGTH), COMPLETED]


def broken_streams() -> list[list[Any]]:
    """Three streams that make one answer of two choices: two break."""
    started = pb.GenerateResponse(
        started=pb.Started(request_id="r-1", model="tiny", num_prompt_tokens=3, seed=2**64 - 1, created_unix_s=7)
    )
    stop = pb.FINISH_REASON_STOP
    return [
        [started, output("a", 1), output("b", 2, 3, choice=1), WorkerLost("died")],
        [started, output("c", 4, choice=1), output("!", 5, choice=1, finish=stop), WorkerLost("died")],
        [started, output("d", 6, finish=stop), COMPLETED],
    ]


def check_resumed(requests: list[pb.GenerateRequest]) -> None:
    first, second, third = requests
    assert not first.HasField("resume")
    choice = pb.ResumedChoice
    choices = [choice(token_ids=[1]), choice(token_ids=[2, 3])]
    assert second.resume == pb.Resume(seed=2**64 - 1, created_unix_s=7, choices=choices)
    assert third.resume.choices == [choice(token_ids=[1]), choice(token_ids=[2, 3, 4, 5], finished=True)]
    second.ClearField("resume")
    assert second == first, "all else is as it was"


@dataclass
class ScriptedRouter(InferenceServiceServicer, OperatorServiceServicer):
    """Plays `scripts` in order, one for each call of Generate: messages to send, a SegueError to fail with, or HOLD. The
    other calls play `unary` likewise."""

    scripts: list[list[Any]] = field(default_factory=list)
    unary: list[Any] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    address: str = ""

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:  # noqa: N802
        self.requests.append(request)
        self.arrived.set()
        try:
            for act in self.scripts.pop(0):
                if act is HOLD:
                    await asyncio.Event().wait()
                elif isinstance(act, Exception):
                    await fail(context, act)
                else:
                    await context.write(act)
        except asyncio.CancelledError:
            self.left.put_nowait("cancelled")
            raise

    async def _answer(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        act = self.unary.pop(0)
        if isinstance(act, Exception):
            await fail(context, act)
        if act is HOLD:
            await asyncio.Event().wait()
        return act

    Tokenize = ListModels = GetClusterStatus = _answer
    Explain = GetOverview = DrainWorker = RestartWorker = SetWorkerRole = _answer


class BareStatus(Exception):
    """Fail as gRPC itself or a proxy would: a status and no metadata of Segue's."""

    def __init__(self, status: grpc.StatusCode) -> None:
        super().__init__(status.name)
        self.status = status


async def fail(context: Any, error: Exception) -> None:
    if isinstance(error, BareStatus):
        await context.abort(error.status, "no details")
    assert isinstance(error, SegueError)
    metadata = [("segue-error-code", error.code), ("segue-error-retryable", "true" if error.retryable else "false")]
    if error.field:
        metadata.append(("segue-error-field", error.field))
    await context.abort(error.grpc_status, error.message, tuple(metadata))


class Naps:
    """Stands for sleeping: notes the pauses, blocking or not, and takes no time."""

    def __init__(self) -> None:
        self.taken_s: list[float] = []

    def sleep(self, pause_s: float) -> None:
        self.taken_s.append(pause_s)

    async def sleep_async(self, pause_s: float) -> None:
        self.taken_s.append(pause_s)


@pytest.fixture
def naps() -> Naps:
    return Naps()


@pytest.fixture
async def router() -> AsyncIterator[ScriptedRouter]:
    scripted = ScriptedRouter()
    server = grpc.aio.server()
    add_InferenceServiceServicer_to_server(scripted, server)
    add_OperatorServiceServicer_to_server(scripted, server)
    scripted.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield scripted
    await server.stop(None)


@pytest.fixture
def script() -> Any:
    """The vocabulary of scripts, as a fixture since test files cannot import one another."""

    class Vocabulary:
        hold = HOLD
        started = STARTED
        completed = COMPLETED
        whole_answer = WHOLE_ANSWER
        output = staticmethod(output)
        broken_streams = staticmethod(broken_streams)
        check_resumed = staticmethod(check_resumed)
        bare_status = BareStatus

    return Vocabulary
