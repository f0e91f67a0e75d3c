"""From a failed gRPC call to an error of segue.errors, and whether the call may be made again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol, cast

import grpc

from segue import errors

_ERROR_CODE = "segue-error-code"
_ERROR_FIELD = "segue-error-field"
_ERROR_RETRYABLE = "segue-error-retryable"
_RETRY_AFTER_MS = "segue-retry-after-ms"

# For failures that Segue did not speak of itself: of gRPC, of the network, of a proxy between.
_ERROR_FOR_STATUS: dict[grpc.StatusCode, type[errors.SegueError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.Unreachable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.RequestCancelled,
    grpc.StatusCode.INVALID_ARGUMENT: errors.RequestError,
    grpc.StatusCode.OUT_OF_RANGE: errors.RequestError,
    grpc.StatusCode.NOT_FOUND: errors.ModelNotFound,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.RequestTooLarge,
}


class _FailedCall(Protocol):
    """What both the sync and the asyncio RpcError know."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


class Failure(NamedTuple):
    error: errors.SegueError
    may_retry: bool


def failure_from_rpc(rpc_error: grpc.RpcError, address: str) -> Failure:
    """`address` is where the call went, for the message."""
    call = cast(_FailedCall, rpc_error)
    metadata = {key: value for key, value in call.trailing_metadata() or () if isinstance(value, str)}
    details = call.details() or ""
    if code := metadata.get(_ERROR_CODE):
        after_ms = metadata.get(_RETRY_AFTER_MS)
        retry_after_s = int(after_ms) / 1000 if after_ms is not None and after_ms.isdecimal() else None
        error = errors.error_from_code(code, details, metadata.get(_ERROR_FIELD), retry_after_s)
        return Failure(error, metadata.get(_ERROR_RETRYABLE) == "true")
    status = call.code()
    error = _ERROR_FOR_STATUS.get(status, errors.InternalError)(_describe(status, details, address))
    return Failure(error, isinstance(error, errors.Unreachable))


def _describe(status: grpc.StatusCode, details: str, address: str) -> str:
    match status:
        case grpc.StatusCode.UNAVAILABLE:
            return f"no Segue cluster answers at {address}: {details}"
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"no whole answer from {address} within the time allowed"
        case grpc.StatusCode.UNIMPLEMENTED:
            return f"what answers at {address} does not serve this call of segue.v1: {details}"
        case _:
            return f"{status.name} from {address}: {details}"
