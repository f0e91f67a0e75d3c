"""Server-sent events. Nothing is sent before the first event is there, so that a request which fails at once gets its status;
an error after that goes into the stream, which then ends without [DONE]."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from aiohttp import web

from router.generation import ChoiceOutput, GenerationEvent
from router.metrics import RequestMeter
from router.openai.errors import STREAM_STARTED, error_body
from router.openai.event_ids import EventIds
from router.openai.responses import SSE_DONE, SSE_RETRY, Answer, sse
from router.service import Service
from segue.errors import RequestCancelled, SegueError

_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

NumberedEvents = AsyncGenerator[tuple[int, GenerationEvent], None]


async def stream_answer(
    service: Service,
    request: web.Request,
    answer: Answer,
    events: NumberedEvents,
    ids: EventIds,
    meter: RequestMeter,
) -> web.StreamResponse:
    """Raises the SegueError of a request that fails before its first output."""
    response = web.StreamResponse(headers=_HEADERS)
    try:
        async for data in _chunks(answer, events, ids):
            await _send(service, request, response, data)
        await _send(service, request, response, SSE_DONE)
    except RequestCancelled:
        raise
    except SegueError as error:
        if not response.prepared:
            raise
        meter.outcome = error.code
        await _send(service, request, response, sse(error_body(error)))
    await response.write_eof()
    return response


async def _chunks(answer: Answer, events: NumberedEvents, ids: EventIds) -> AsyncIterator[bytes]:
    async for prompt, event in events:
        chunk = answer.chunk(prompt, event)
        if isinstance(event, ChoiceOutput):
            ids.note(prompt, event)
            if event.is_seen:
                continue
        if chunk is not None:
            yield sse(chunk, ids.last())
    if (chunk := answer.last_chunk()) is not None:
        yield sse(chunk)


async def _send(service: Service, request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Raises RequestCancelled when the client is gone, or reads nothing for too long; its connection is cut then."""
    try:
        if not response.prepared:
            request[STREAM_STARTED] = True
            await service.read_by_client(response.prepare(request))
            data = SSE_RETRY + data
        await service.read_by_client(response.write(data))
    except ConnectionError:
        raise RequestCancelled("the client closed the connection") from None
    except RequestCancelled:
        if request.transport is not None:
            request.transport.abort()
        raise
