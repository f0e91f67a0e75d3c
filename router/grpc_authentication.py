"""Lets only those in, over gRPC, whose API key is for the call. Runs before anything of a message is read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from router.access import Access, grpc_needs
from router.caller import CURRENT_CALLER
from router.grpc_api import abort_with
from segue.errors import SegueError

if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any] | None


class Authentication(grpc.aio.ServerInterceptor):
    """Sets the task's caller: gRPC runs interceptors and handler of a call in one task, of that call alone."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        metadata: Any = handler_call_details.invocation_metadata
        authorization = next((value for key, value in metadata if key == "authorization"), None)
        try:
            caller = self._access.caller(authorization, grpc_needs(handler_call_details.method))
        except SegueError as error:
            return _refusal(error)
        CURRENT_CALLER.set(caller)
        return await continuation(handler_call_details)


def _refusal(error: SegueError) -> Handler:
    """Answers a call of any shape, and reads none of its messages."""

    async def refuse(_requests: AsyncIterator[bytes], context: Any) -> None:
        await abort_with(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
