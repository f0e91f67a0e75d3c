"""The one tree of errors. Each class knows its status on both APIs and whether the same request, sent again, may succeed.

SegueError
├── RequestError              the request is at fault; never retryable
│   ├── InvalidRequest        a field has a bad value (names the field)
│   ├── Unauthenticated       no API key, or one that is not known (any more)
│   ├── PermissionDenied      the API key is not for calls of this kind
│   ├── ModelNotFound         the model asked for is not served here
│   └── RequestTooLarge       a size limit was exceeded
├── Unavailable               the cluster cannot serve this now; retryable
│   ├── NoWorker              no live worker has the role that is needed
│   ├── Overloaded            queues are full
│   ├── RateLimited           the caller has used up what its API key allows for now
│   ├── Unreachable           nothing answers at the cluster's address (raised by the client)
│   └── WorkerLost            the worker that held the request died or left
├── TransferError             the hand-over of KV cache failed; retryable
│   ├── ChecksumMismatch      bytes arrived damaged
│   ├── LeaseExpired          nothing was heard of a ticket in time
│   └── TransferRefused       the pair cannot work together, or the ticket is no longer honoured
├── RequestCancelled          the client went away
├── DeadlineExceeded          the time allowed for the request is over
├── ConfigError               the configuration is wrong (names the setting)
├── ModelFileError            a model's files are damaged, incomplete or unsupported (names the file)
├── StoreUnavailable          the membership store does not answer
└── InternalError             a defect of Segue

Over the wire an error is its `code` and message; `error_from_code` builds it again.
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class SegueError(Exception):
    """Base of all errors that Segue raises on purpose."""

    code: ClassVar[str] = "internal"
    grpc_status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        """`retry_after_s`: where sending again can help, but not sooner."""
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


class RequestError(SegueError):
    code = "invalid_request"
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400


class InvalidRequest(RequestError):
    """A field of the request has a value that cannot be served."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}", field=field)


class Unauthenticated(RequestError):
    code = "unauthenticated"
    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401


class PermissionDenied(RequestError):
    code = "permission_denied"
    grpc_status = grpc.StatusCode.PERMISSION_DENIED
    http_status = 403


class ModelNotFound(RequestError):
    code = "model_not_found"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404


class RequestTooLarge(RequestError):
    code = "request_too_large"
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 413


class Unavailable(SegueError):
    code = "unavailable"
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    retryable = True


class NoWorker(Unavailable):
    code = "no_worker"


class Overloaded(Unavailable):
    code = "overloaded"
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429


class RateLimited(Unavailable):
    code = "rate_limited"
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429


class Unreachable(Unavailable):
    code = "unreachable"


class WorkerLost(Unavailable):
    code = "worker_lost"


class TransferError(SegueError):
    code = "transfer_failed"
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    retryable = True


class ChecksumMismatch(TransferError):
    code = "checksum_mismatch"


class LeaseExpired(TransferError):
    code = "lease_expired"


class TransferRefused(TransferError):
    code = "transfer_refused"


class RequestCancelled(SegueError):
    code = "cancelled"
    grpc_status = grpc.StatusCode.CANCELLED
    http_status = 499


class DeadlineExceeded(SegueError):
    code = "deadline_exceeded"
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504


class ConfigError(SegueError):
    code = "config"


class ModelFileError(SegueError):
    code = "model_file"


class StoreUnavailable(SegueError):
    code = "store_unavailable"
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    retryable = True


class InternalError(SegueError):
    code = "internal"


def _tree(root: type[SegueError]) -> list[type[SegueError]]:
    return [root, *(leaf for child in root.__subclasses__() for leaf in _tree(child))]


# The first class of each code, from the root down: RequestError stands for its subclass InvalidRequest on the wire.
_BY_CODE: dict[str, type[SegueError]] = {}
for _error_class in _tree(SegueError)[1:]:
    _BY_CODE.setdefault(_error_class.code, _error_class)


def error_from_code(code: str, message: str, field: str | None = None, retry_after_s: float | None = None) -> SegueError:
    """The error that `code` stands for; an unknown code, from a newer peer, becomes an InternalError."""
    return _BY_CODE.get(code, InternalError)(message, field=field, retry_after_s=retry_after_s)
