"""A SequenceServer without workers: it plays a script, so that the router's front can be tried and tested alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

from router.sequence import SequencePath, SequenceRequest, TokenStep
from segue.errors import SegueError
from segue.lifecycle import Phase
from segue.sampling import FinishReason, GeneratedToken
from segue.v1 import inference_pb2 as pb
from segue.v1.operator_pb2 import ScaleWorkersResponse
from segue.v1.worker_pb2 import Departure

# A step is given out, an error is raised, an event is waited for.
ScriptItem = TokenStep | SegueError | asyncio.Event
Script = Callable[[SequenceRequest], Iterable[ScriptItem]]


def token_steps(token_ids: Sequence[int], finish_reason: FinishReason | None = FinishReason.LENGTH) -> list[TokenStep]:
    """One step for each token; the last carries `finish_reason`."""
    last = len(token_ids) - 1
    return [
        TokenStep((GeneratedToken(token_id),), finish_reason if place == last else None)
        for place, token_id in enumerate(token_ids)
    ]


class FakeSequenceServer:
    """Remembers what it was asked. Every request is in exactly one of `active`, `finished`, `failed` and `cancelled`."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[SequenceRequest] = []
        self.active: set[str] = set()
        self.finished: list[str] = []
        self.failed: list[str] = []
        self.cancelled: list[str] = []
        self.missing: list[str] = []
        self.max_tokens: int | None = 10_000
        self.workers: list[pb.WorkerStatus] = []
        self._changed = asyncio.Event()

    async def serve(self, request: SequenceRequest, path: SequencePath) -> AsyncGenerator[TokenStep, None]:
        self.requests.append(request)
        self.active.add(request.sequence_id)
        self._changed.set()
        outcome, phase = self.cancelled, Phase.CANCELLED
        try:
            self._assign(path)
            async for step in self._play(request):
                _advance(path)
                yield step
                if step.finish_reason is not None:
                    outcome, phase = self.finished, Phase.FINISHED
        except SegueError:
            outcome, phase = self.failed, Phase.FAILED
            raise
        finally:
            self.active.discard(request.sequence_id)
            outcome.append(request.sequence_id)
            path.lifecycle.enter(phase)
            self._changed.set()

    async def until(self, holds: Callable[[FakeSequenceServer], bool]) -> None:
        """Waits until sequences have come or gone so that `holds` does. For one waiter at a time."""
        while not holds(self):
            self._changed.clear()
            await self._changed.wait()

    async def _play(self, request: SequenceRequest) -> AsyncGenerator[TokenStep, None]:
        for item in self.script(request):
            if isinstance(item, asyncio.Event):
                await item.wait()
            elif isinstance(item, SegueError):
                raise item
            else:
                # Other sequences get their turn between any two steps, as with real workers.
                await asyncio.sleep(0)
                yield item

    def _assign(self, path: SequencePath) -> None:
        path.prefill_worker, path.decode_worker, path.transport = "prefill-0", "decode-0", "shm"
        path.prefill_cached_tokens, path.decode_cached_tokens, path.transferred_bytes = 3, 2, 4096
        path.lifecycle.enter(Phase.RESERVED)

    def status(self) -> pb.GetClusterStatusResponse:
        return pb.GetClusterStatusResponse(
            model="fake", workers=self.workers, active_requests=len(self.active), membership_fresh=True, version="0"
        )

    def missing_roles(self) -> list[str]:
        return self.missing

    @property
    def max_sequence_tokens(self) -> int | None:
        return self.max_tokens


class FakeOperator:
    """Implements router.operations.Operator: remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []

    async def drain(self, worker_id: str, grace_s: float, departure: Departure.ValueType, *, force: bool) -> pb.WorkerStatus:
        self.asked.append(("drain", worker_id, grace_s, departure, force))
        return pb.WorkerStatus(worker_id=worker_id, state="draining")

    async def take_back(self, worker_id: str) -> pb.WorkerStatus:
        self.asked.append(("take_back", worker_id))
        return pb.WorkerStatus(worker_id=worker_id, state="ready")

    async def set_role(self, worker_id: str, role: str, lease_s: float, *, force: bool) -> pb.WorkerStatus:
        self.asked.append(("set_role", worker_id, role, lease_s, force))
        return pb.WorkerStatus(worker_id=worker_id, roles=[role], state="ready")

    async def scale(self, prefill: int | None, decode: int | None) -> ScaleWorkersResponse:
        self.asked.append(("scale", prefill, decode))
        return ScaleWorkersResponse(prefill=prefill or 1, decode=decode or 1, starting=["decode-1"], problem="no room")


def _advance(path: SequencePath) -> None:
    """The first token comes from prefill, the second shows that decode has taken over."""
    following = {Phase.RESERVED: Phase.TRANSFERRING, Phase.TRANSFERRING: Phase.DECODING}
    if (phase := following.get(path.lifecycle.phase)) is not None:
        path.lifecycle.enter(phase)
