"""The HTTP application on its port. No client can have more of it than a share: connections are counted, bodies have to come in
time, and so has the rest of a request (aiohttp closes a connection that leaves one unfinished for the keep-alive time)."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable

from aiohttp import web

# Connections that a client leaves open are closed by it first: a proxy's usual limit is 60 s.
KEEPALIVE_S = 75.0
HANDSHAKE_LIMIT_S = 10.0
# 8 MiB in this time are 2 Mbit/s.
BODY_LIMIT_S = 30.0

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpServer:
    """Listens from `start` to `stop`. `max_connections`: further ones get a 503 and are closed."""

    def __init__(self, application: web.Application, *, max_connections: int, shutdown_grace_s: float) -> None:
        self._max_connections = max_connections
        self._runner = web.AppRunner(
            application,
            handler_cancellation=True,
            shutdown_timeout=shutdown_grace_s,
            keepalive_timeout=KEEPALIVE_S,
            access_log=None,
        )
        self._listener: asyncio.Server | None = None

    async def start(self, host: str, port: int, tls: ssl.SSLContext | None, *, reuse_port: bool = False) -> int:
        """Gives the port. Raises OSError."""
        await self._runner.setup()
        self._listener = await asyncio.get_running_loop().create_server(
            self._protocol,
            host,
            port,
            ssl=tls,
            reuse_address=True,
            reuse_port=reuse_port,
            ssl_handshake_timeout=None if tls is None else HANDSHAKE_LIMIT_S,
        )
        return int(self._listener.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Takes nothing new; what runs may finish, for the time of grace."""
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()

    def _protocol(self) -> asyncio.BaseProtocol:
        server = self._runner.server
        assert server is not None
        return server() if len(server.connections) < self._max_connections else _TurnedAway()


class _TurnedAway(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        transport.close()


@web.middleware
async def read_body_in_time(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Handlers find the body read: whoever sends it drop by drop holds a connection, for a while, and nothing else."""
    try:
        async with asyncio.timeout(BODY_LIMIT_S):
            await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(reason=f"the body did not arrive within {BODY_LIMIT_S:g} s") from None
    return await handler(request)
