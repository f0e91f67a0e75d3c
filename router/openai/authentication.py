"""Lets only those in, over HTTP, whose API key is for the call. Runs before anything of a body is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from router.access import Access, http_needs
from router.caller import CURRENT_CALLER

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def authenticate(access: Access) -> Middleware:
    """A middleware that sets the task's caller."""

    @web.middleware
    async def check(request: web.Request, handler: _Handler) -> web.StreamResponse:
        caller = access.caller(request.headers.get("Authorization"), http_needs(request.path))
        before = CURRENT_CALLER.set(caller)
        try:
            return await handler(request)
        finally:
            # The same task answers the connection's next request.
            CURRENT_CALLER.reset(before)

    return check
