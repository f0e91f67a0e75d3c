"""The blocking client. Safe to use from several threads; each stream is read by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from segue.client import status as status_types
from segue.client.access import Access, target
from segue.client.channel import CHANNEL_OPTIONS, CONTROL_TIMEOUT_S, DEFAULT_ADDRESS, DEFAULT_TIMEOUT_S, READY_TIMEOUT_S
from segue.client.events import Completed, Event, Output, event_from_pb
from segue.client.failures import failure_from_rpc
from segue.client.requests import GenerateOptions, Prompt, generate_request, tokenize_request
from segue.client.results import Generation, GenerationBuilder
from segue.client.resumption import Resumption
from segue.client.retry import Attempts, ReadinessWait, RetryPolicy
from segue.errors import InternalError, NoWorker, RequestCancelled, SegueError
from segue.v1 import inference_pb2 as pb
from segue.v1 import operator_pb2
from segue.v1.inference_pb2_grpc import InferenceServiceStub
from segue.v1.operator_pb2_grpc import OperatorServiceStub

if TYPE_CHECKING:
    from grpc import _CallIterator

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


class Client:
    """A connection to one router of a cluster, made when it is first needed.

    >>> with Client() as client:
    ...     print(client.generate("The capital of France is", max_tokens=8, temperature=0).text)

    `access` is the API key and TLS, from the environment unless given (segue/client/access.py).

    `timeout_s` bounds each `generate` and `stream` that names no other, retries included; None waits for ever. A call is
    sent again, as `retry` says, only while none of its output was given out, and only when the cluster marked the error as
    retryable or could not be reached. Every failure is an error of `segue.errors`.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        access: Access | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008 - frozen
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._retry = retry
        self._sleep = sleep
        access = Access.from_env() if access is None else access
        credentials = access.credentials(address)
        if credentials is None:
            self._channel = grpc.insecure_channel(target(address), options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target(address), credentials, options=CHANNEL_OPTIONS)
        self._metadata = access.metadata
        self._stub = InferenceServiceStub(self._channel)
        self._operator = OperatorServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends every call that is still under way, and the connection."""
        self._channel.close()

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """The whole answer to `prompt`: text (continued as it stands), token ids, or the messages of a chat."""
        answer = GenerationBuilder()
        with self.stream(prompt, **options) as stream:
            for event in stream:
                answer.add(event)
        return answer.build()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> GenerationStream:
        """The same request as `generate`, its events as they come. It is sent when the iteration begins."""
        request = generate_request(prompt, options)
        attempts = Attempts(self._retry, options.get("timeout_s", self._timeout_s))
        return GenerationStream(self._stub, request, attempts, address=self.address, metadata=self._metadata, sleep=self._sleep)

    def tokenize(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        model: str | None = None,
        timeout_s: float | None = CONTROL_TIMEOUT_S,
    ) -> status_types.Tokenization:
        """The token ids that `generate` would use for this text or chat."""
        response = self._call(self._stub.Tokenize, tokenize_request(prompt, model), timeout_s)
        return status_types.tokenization_from_pb(response)

    def models(self, *, timeout_s: float | None = CONTROL_TIMEOUT_S) -> tuple[status_types.ModelInfo, ...]:
        """The models that the cluster serves."""
        return status_types.models_from_pb(self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout_s))

    def status(self, *, timeout_s: float | None = CONTROL_TIMEOUT_S) -> status_types.ClusterStatus:
        """Workers, their roles, load and KV cache, as the router sees them now."""
        return status_types.status_from_pb(self._call(self._stub.GetClusterStatus, pb.GetClusterStatusRequest(), timeout_s))

    def wait_ready(self, *, timeout_s: float | None = READY_TIMEOUT_S) -> status_types.ClusterStatus:
        """Waits until the cluster has a ready worker for each role. After `timeout_s` raises what is still missing:
        Unreachable, NoWorker, or the router's own retryable error."""
        wait = ReadinessWait(timeout_s)
        while True:
            try:
                status = self.status()
            except SegueError as error:
                if not error.retryable:
                    raise
                self._sleep(wait.pause_s(error))
                continue
            if not status.missing_roles:
                return status
            self._sleep(wait.pause_s(NoWorker(f"no ready worker for: {', '.join(status.missing_roles)}")))

    def drain_worker(
        self, worker_id: str, *, grace_s: float | None = None, undo: bool = False, force: bool = False
    ) -> status_types.WorkerStatus:
        """Lets a worker finish what it has, `grace_s` at most (None: 60), and take nothing new; or takes it back. See `status`
        for how far it is. `force`: also when no other ready worker has its role."""
        request = operator_pb2.DrainWorkerRequest(worker_id=worker_id, grace_s=grace_s, undo=undo, force=force)
        response = self._call(self._operator.DrainWorker, request, CONTROL_TIMEOUT_S)
        return status_types.worker_from_pb(response.worker)

    def restart_worker(self, worker_id: str, *, grace_s: float | None = None, force: bool = False) -> status_types.WorkerStatus:
        """Drains a worker and ends its process, to be started anew by whatever keeps it."""
        request = operator_pb2.RestartWorkerRequest(worker_id=worker_id, grace_s=grace_s, force=force)
        response = self._call(self._operator.RestartWorker, request, CONTROL_TIMEOUT_S)
        return status_types.worker_from_pb(response.worker)

    def set_worker_role(self, worker_id: str, role: str, *, lease_s: float, force: bool = False) -> status_types.WorkerStatus:
        """Gives a worker another role for `lease_s`; asking again renews it."""
        request = operator_pb2.SetWorkerRoleRequest(worker_id=worker_id, role=role, lease_s=lease_s, force=force)
        response = self._call(self._operator.SetWorkerRole, request, CONTROL_TIMEOUT_S)
        return status_types.worker_from_pb(response.worker)

    def scale_workers(self, *, prefill: int | None = None, decode: int | None = None) -> status_types.ScaleStatus:
        """Says how many workers of each role there shall be (None: as many as before), and tells how far that is; without
        numbers it only tells."""
        request = operator_pb2.ScaleWorkersRequest(prefill=prefill, decode=decode)
        return status_types.scale_from_pb(self._call(self._operator.ScaleWorkers, request, CONTROL_TIMEOUT_S))

    def explain(self, request_id: str = "") -> operator_pb2.RequestRecord:
        """Which way a recent request took and where its time went, as the router that served it remembers it; without an id
        the latest."""
        response = self._call(self._operator.Explain, operator_pb2.ExplainRequest(request_id=request_id), CONTROL_TIMEOUT_S)
        return response.record

    def overview(self, num_requests: int = 20, request_id: str = "") -> operator_pb2.GetOverviewResponse:
        """The cluster and what this router has served lately: its newest `num_requests` requests and the one of `request_id`,
        if that is remembered, and how long tokens took."""
        request = operator_pb2.GetOverviewRequest(num_requests=num_requests, request_id=request_id)
        return self._call(self._operator.GetOverview, request, CONTROL_TIMEOUT_S)

    def _call(
        self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request, timeout_s: float | None
    ) -> Response:
        attempts = Attempts(self._retry, timeout_s)
        while True:
            try:
                return method(request, timeout=attempts.begin(), metadata=self._metadata)
            except grpc.RpcError as error:
                pause_s = attempts.pause_s(failure_from_rpc(error, self.address))
            self._sleep(pause_s)


class GenerationStream:
    """The events of one request: Started, Outputs, Completed. Iterate over it once.

    Leaving the loop early cancels the request, as does `cancel()` (from any thread; the reader gets RequestCancelled) and
    leaving the `with` block.
    """

    def __init__(
        self,
        stub: InferenceServiceStub,
        request: pb.GenerateRequest,
        attempts: Attempts,
        *,
        address: str,
        metadata: tuple[tuple[str, str], ...],
        sleep: Callable[[float], None],
    ) -> None:
        self._stub = stub
        self._resumption = Resumption(request)
        self._attempts = attempts
        self._address = address
        self._metadata = metadata
        self._sleep = sleep
        self._call: _CallIterator[pb.GenerateResponse] | None = None
        self._cancelled = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Ends the request and frees all it holds in the cluster. Does nothing once the request is over."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    def __iter__(self) -> Iterator[Event]:
        if self._call is not None:
            raise RuntimeError("a stream can be iterated over once")
        while True:
            try:
                yield from self._attempt()
                return
            except grpc.RpcError as error:
                if self._cancelled:
                    raise RequestCancelled("the stream was cancelled") from None
                pause_s = self._attempts.pause_s(failure_from_rpc(error, self._address))
            self._sleep(pause_s)

    def _attempt(self) -> Iterator[Event]:
        call = self._call = self._stub.Generate(
            self._resumption.request(), timeout=self._attempts.begin(), metadata=self._metadata
        )
        try:
            # cancel() may have come before the call was there to be cancelled.
            if self._cancelled:
                raise RequestCancelled("the stream was cancelled")
            for message in call:
                event = event_from_pb(message)
                if isinstance(event, Output):
                    self._attempts.output_came()
                if event is not None and self._resumption.see(event):
                    yield event
                if isinstance(event, Completed):
                    return
            raise InternalError("the router ended the stream before it completed the request")
        finally:
            call.cancel()
