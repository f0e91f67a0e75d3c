"""segue.v1.InferenceService on the router's front, with grpc.health.v1 and reflection.

Methods are registered with their raw bytes: a request that does not parse (text that is not UTF-8, say) is then answered
like any other bad request, and not with gRPC's own INTERNAL.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from grpc_reflection.v1alpha import reflection

from router.caller import CURRENT_CALLER
from router.explain import path_text
from router.generation import ChoiceOutput, GenerationDone, GenerationEvent
from router.grpc_health import HEALTH_SERVICE_NAME, add_health
from router.grpc_options import options_from_pb
from router.options import GenerationSpec, Seen
from router.service import Service
from router.text import ChatMessage
from segue.errors import InternalError, InvalidRequest, SegueError
from segue.v1 import inference_pb2 as pb
from segue.wire import finish_reason_to_pb, token_to_pb

logger = logging.getLogger(__name__)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name

_Context = grpc.aio.ServicerContext[bytes, bytes]
_Request = TypeVar("_Request", bound=Message)
_API = "grpc"
_MAX_CALLS_PER_CONNECTION = 1024
_MAX_METADATA_BYTES = 16 * 2**10
_PATH_KEY = "segue-path"


def server_options(max_body: int, max_connections: int, *, shares_port: bool = False) -> list[tuple[str, int]]:
    """Channel options for the server, which bound what one client can have of it. Without so_reuseport=0 a port in use would be
    shared without a word."""
    return [
        ("grpc.max_receive_message_length", max_body),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", int(shares_port)),
        ("grpc.max_allowed_incoming_connections", max_connections),
        # On one connection; further calls of its client wait there.
        ("grpc.max_concurrent_streams", _MAX_CALLS_PER_CONNECTION),
        ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
        ("grpc.server_handshake_timeout_ms", 10_000),
        # A client that vanished without a word holds its calls no longer than this.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]


def add_services(server: grpc.aio.Server, service: Service) -> None:
    """Adds the public API and health."""
    servicer = InferenceServicer(service)
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Generate": grpc.unary_stream_rpc_method_handler(servicer.generate),
        "Tokenize": grpc.unary_unary_rpc_method_handler(unary(servicer.tokenize)),
        "ListModels": grpc.unary_unary_rpc_method_handler(unary(servicer.list_models)),
        "GetClusterStatus": grpc.unary_unary_rpc_method_handler(unary(servicer.get_cluster_status)),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, methods),))
    add_health(server, SERVICE_NAME, service.readiness)


def add_reflection(server: grpc.aio.Server, *further_services: str) -> None:
    names = (SERVICE_NAME, HEALTH_SERVICE_NAME, reflection.SERVICE_NAME, *further_services)
    reflection.enable_server_reflection(names, server)


class InferenceServicer:
    """One method for each rpc; requests and responses are serialized messages."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def generate(self, data: bytes, context: _Context) -> None:
        with self._service.arrival(_traceparent(context)) as request_id:
            await self._generate(request_id, data, context)

    async def _generate(self, request_id: str, data: bytes, context: _Context) -> None:
        async with _errors_abort(context):
            with self._service.metrics.track(_API) as meter:
                request = parse(pb.GenerateRequest, data)
                created_unix_s = request.resume.created_unix_s or int(time.time())
                spec = await self._plan(request_id, request, created_unix_s, _deadline_s(context))
                with self._service.records.record(spec.request_id, _API, len(spec.prompt_token_ids)) as record:
                    try:
                        await self._send(context, self._started(spec, created_unix_s))
                        async with aclosing(self._service.generate(spec, record)) as events:
                            async for event in events:
                                meter.see(event)
                                record.see(event)
                                await self._send(context, event_to_pb(event))
                    finally:
                        if record.first_path is not None:
                            context.set_trailing_metadata(((_PATH_KEY, path_text(record.first_path)),))

    async def tokenize(self, data: bytes) -> bytes:
        request = parse(pb.TokenizeRequest, data)
        self._check_model(request.model)
        kind = request.WhichOneof("input")
        if kind is None:
            raise InvalidRequest("input", "is missing; give text or chat")
        token_ids = await self._encode(request, int(time.time()))
        return pb.TokenizeResponse(token_ids=token_ids, max_context=self._service.limits.max_context).SerializeToString()

    async def list_models(self, data: bytes) -> bytes:
        parse(pb.ListModelsRequest, data)
        limits = self._service.limits
        model = pb.Model(
            id=self._service.model_name,
            max_context=limits.max_context,
            vocab_size=limits.vocab_size,
            created_unix_s=self._service.created_unix_s,
        )
        return pb.ListModelsResponse(models=[model]).SerializeToString()

    async def get_cluster_status(self, data: bytes) -> bytes:
        parse(pb.GetClusterStatusRequest, data)
        return self._service.server.status().SerializeToString()

    async def _plan(
        self, request_id: str, request: pb.GenerateRequest, created_unix_s: int, deadline_s: float | None
    ) -> GenerationSpec:
        self._check_model(request.model)
        kind = request.WhichOneof("prompt")
        if kind is None:
            raise InvalidRequest("prompt", "is missing; give text, token_ids or chat")
        options, seen = (
            options_from_pb(request),
            [Seen(tuple(choice.token_ids), is_finished=choice.finished) for choice in request.resume.choices],
        )
        names = {"prompt": kind, "logprobs": "num_logprobs"}
        token_ids = list(request.token_ids.ids) if kind == "token_ids" else await self._encode(request, created_unix_s)
        return self._service.build_spec(
            request_id,
            token_ids,
            options,
            names,
            continues_text=kind != "chat",
            seen=seen,
            caller=CURRENT_CALLER.get().asking(request.priority),
            deadline_s=deadline_s,
        )

    async def _encode(self, request: pb.GenerateRequest | pb.TokenizeRequest, now_unix_s: int) -> list[int]:
        if request.HasField("chat"):
            return await self._encode_chat(request.chat, now_unix_s)
        return await self._service.encode_text(request.text)

    async def _encode_chat(self, chat: pb.Chat, now_unix_s: int) -> list[int]:
        if not chat.messages:
            raise InvalidRequest("messages", "is empty; a chat has at least one message")
        for message in chat.messages:
            if message.role not in {"system", "user", "assistant"}:
                raise InvalidRequest("role", f"must be system, user or assistant, not {message.role!r}")
        return await self._service.encode_chat(
            [ChatMessage(message.role, message.content) for message in chat.messages], now_unix_s
        )

    def _check_model(self, name: str) -> None:
        if name:
            self._service.check_model(name)

    def _started(self, spec: GenerationSpec, created_unix_s: int) -> pb.GenerateResponse:
        return pb.GenerateResponse(
            started=pb.Started(
                request_id=spec.request_id,
                model=self._service.model_name,
                num_prompt_tokens=len(spec.prompt_token_ids),
                seed=spec.sampling.seed,
                created_unix_s=created_unix_s,
            )
        )

    async def _send(self, context: _Context, response: pb.GenerateResponse) -> None:
        await self._service.read_by_client(context.write(response.SerializeToString()))


def _traceparent(context: _Context) -> str | None:
    values = (value for key, value in context.invocation_metadata() or () if key == "traceparent")
    return next((value for value in values if isinstance(value, str)), None)


def _deadline_s(context: _Context) -> float | None:
    """The call's own, on the loop's clock."""
    left_s = context.time_remaining()
    return None if left_s is None else asyncio.get_running_loop().time() + left_s


def event_to_pb(event: GenerationEvent) -> pb.GenerateResponse:
    if isinstance(event, GenerationDone):
        return pb.GenerateResponse(
            completed=pb.Completed(
                num_prompt_tokens=event.num_prompt_tokens,
                num_output_tokens=event.num_output_tokens,
                paths=event.paths_to_pb(),
            )
        )
    return pb.GenerateResponse(output=_output_to_pb(event))


def _output_to_pb(output: ChoiceOutput) -> pb.Output:
    return pb.Output(
        choice=output.choice,
        text=output.text,
        tokens=[token_to_pb(token) for token in output.tokens],
        finish_reason=finish_reason_to_pb(output.finish_reason),
    )


def parse(message_class: type[_Request], data: bytes) -> _Request:
    try:
        return message_class.FromString(data)
    except DecodeError as error:
        name = message_class.DESCRIPTOR.name
        raise InvalidRequest("request", f"is not a valid {name} (text must be UTF-8): {error}") from None


def unary(method: Callable[[bytes], Awaitable[bytes]]) -> Callable[[bytes, _Context], Awaitable[bytes]]:
    async def handle(data: bytes, context: _Context) -> bytes:
        async with _errors_abort(context):
            return await method(data)
        raise AssertionError("an aborted call has already left")

    return handle


@asynccontextmanager
async def _errors_abort(context: _Context) -> AsyncIterator[None]:
    """Ends the call with the error's status; the trailing metadata says more, as inference.proto tells."""
    try:
        yield
    except SegueError as error:
        await abort_with(context, error)
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception:
        # A defect of ours: the client gets a well-formed answer, the log the trace.
        logger.exception("a gRPC call failed")
        await abort_with(context, InternalError("internal error; the router's log says more"))


async def abort_with(context: _Context, error: SegueError) -> None:
    metadata = [
        *(context.trailing_metadata() or ()),
        ("segue-error-code", error.code),
        ("segue-error-retryable", str(error.retryable).lower()),
    ]
    if error.field is not None:
        metadata.append(("segue-error-field", error.field))
    if error.retry_after_s is not None:
        metadata.append(("segue-retry-after-ms", str(math.ceil(1000 * error.retry_after_s))))
    await context.abort(error.grpc_status, error.message, tuple(metadata))
