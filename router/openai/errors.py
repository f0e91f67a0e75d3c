"""Errors in OpenAI's JSON shape, for every way in which an HTTP request can go wrong."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Middleware

from router.explain import PATH_HEADER, TIMING_HEADER, path_text, timing_text
from router.records import RequestRecord
from router.service import Service
from segue.errors import InternalError, InvalidRequest, RequestTooLarge, SegueError
from segue.tracing import CURRENT_TRACE, TraceContext

logger = logging.getLogger(__name__)

RETRY_AFTER_S = "1"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    429: "rate_limit_error",
}

# Set on a request whose answer has begun: no other answer can be given then.
STREAM_STARTED = web.RequestKey("stream_started", bool)

# One for each HTTP request, unique over all routers; in the x-request-id header and part of its sequences' ids.
REQUEST_ID = web.RequestKey("request_id", str)

# The router's own span of it; None where nobody traces it.
TRACE = web.RequestKey[TraceContext | None]("trace", TraceContext)

# Of a request that was found fit to be served.
RECORD = web.RequestKey("record", RequestRecord)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def error_body(error: SegueError) -> dict[str, Any]:
    return _body(error.message, error.http_status, error.code, error.field)


def _body(message: str, status: int, code: str, param: str | None) -> dict[str, Any]:
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: SegueError) -> web.Response:
    headers = {}
    if error.http_status in {429, 503}:
        headers["Retry-After"] = RETRY_AFTER_S if error.retry_after_s is None else str(math.ceil(error.retry_after_s))
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _respond(error_body(error), error.http_status, headers)


def _respond(body: dict[str, Any], status: int, headers: dict[str, str]) -> web.Response:
    return web.Response(text=json.dumps(body), status=status, headers=headers, content_type="application/json")


def _from_aiohttp(error: web.HTTPException, request: web.Request) -> web.Response:
    """What aiohttp itself refuses: unknown paths, wrong methods, bodies that are too large."""
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return error_response(RequestTooLarge("the body is too large", field="body"))
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        message = f"{request.path} takes {allowed}, not {request.method}"
        return _respond(_body(message, 405, "method_not_allowed", None), 405, {"Allow": allowed})
    if isinstance(error, web.HTTPNotFound):
        return _respond(_body(f"there is nothing at {request.path}", 404, "unknown_path", None), 404, {})
    return _respond(_body(error.reason, error.status, "http_error", None), error.status, {})


def give_request_id(service: Service) -> Middleware:
    @web.middleware
    async def arrive(request: web.Request, handler: _Handler) -> web.StreamResponse:
        with service.arrival(request.headers.get("traceparent")) as request_id:
            request[REQUEST_ID], request[TRACE] = request_id, CURRENT_TRACE.get()
            return await handler(request)

    return arrive


async def show_request(request: web.Request, response: web.StreamResponse) -> None:
    """Runs before the headers of any response go out, streams and errors included. Of several choices the headers tell the
    first one's path."""
    if REQUEST_ID in request:
        response.headers["x-request-id"] = request[REQUEST_ID]
    if (trace := request.get(TRACE)) is not None:
        response.headers["traceresponse"] = trace.traceparent
    if RECORD in request and (path := request[RECORD].first_path) is not None:
        response.headers[PATH_HEADER] = path_text(path)
        response.headers[TIMING_HEADER] = timing_text(path)


@web.middleware
async def answer_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Turns whatever a handler raises into an answer, unless a stream has begun: that can only be cut."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _from_aiohttp(error, request)
    except web.RequestPayloadError as error:
        return error_response(InvalidRequest("body", f"cannot be read: {error}"))
    except SegueError as error:
        if STREAM_STARTED in request:
            raise
        return error_response(error)
    except Exception:
        if STREAM_STARTED in request:
            raise
        # A defect of ours: the client gets a well-formed answer, the log the trace.
        logger.exception("request %s %s failed", request.method, request.path)
        return error_response(InternalError("internal error; the router's log says more"))
