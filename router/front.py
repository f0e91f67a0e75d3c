"""The router's front as one thing: both APIs, bound to their ports for as long as the `async with` block runs.

On leaving: /ready says no → neither port takes new connections or calls → running requests may finish, up to a limit → the
rest are cancelled, which frees what they hold on the workers.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import grpc.aio

from router.access import Access
from router.grpc_api import add_reflection, add_services, server_options
from router.grpc_authentication import Authentication
from router.http_server import HttpServer
from router.metrics import Metrics
from router.openai.http import build_application
from router.operations import Operator
from router.operator_api import SERVICE_NAME as OPERATOR_SERVICE_NAME
from router.operator_api import add_operator_service
from router.options import ModelLimits
from router.quotas import Quotas
from router.readiness import Readiness
from router.records import Records
from router.sequence import SequenceServer
from router.service import Service
from router.text import Tokenizer
from router.tls import ServerTls, TlsFiles
from router.tracing import RequestTracing
from segue.config import RouterSettings
from segue.errors import ConfigError, ModelFileError
from segue.models.config import ModelConfig
from segue.runtime import background
from segue.tracing import NO_SPANS, Spans


class Front:
    """Addresses are known once the block was entered."""

    def __init__(
        self,
        settings: RouterSettings,
        tokenizer: Tokenizer,
        model_config: ModelConfig,
        server: SequenceServer,
        operator: Operator,
        quotas: Quotas | None = None,
        spans: Spans = NO_SPANS,
    ) -> None:
        """Raises ModelFileError when the tokenizer makes tokens that the model does not have, ConfigError for files of keys or
        certificates that are no good."""
        if tokenizer.num_token_ids > model_config.vocab_size:
            raise ModelFileError(
                f"{settings.model_dir}: tokenizer.json has token ids up to {tokenizer.num_token_ids - 1}, "
                f"config.json a vocab_size of {model_config.vocab_size}"
            )
        self._settings = settings
        self.server = server
        self._access = Access(settings.api_keys_file, settings.secret)
        self._tls = _tls(settings)
        self._operator = operator
        self._exits = AsyncExitStack()
        self._http_port = self._grpc_port = 0
        self.metrics = Metrics(server)
        tracing = RequestTracing(spans, settings.trace_ratio)
        self.records = Records(on_over=tracing.over)
        self.readiness = Readiness(
            server, model_config.bos_token_id or 0, lambda: self.metrics.last_decoded_s, self.metrics.clock
        )
        self._service = Service(
            model_name=settings.model_name,
            tokenizer=tokenizer,
            limits=ModelLimits(model_config.max_context, model_config.vocab_size, model_config.eos_token_ids),
            server=server,
            metrics=self.metrics,
            readiness=self.readiness,
            records=self.records,
            created_unix_s=int(time.time()),
            max_body=settings.max_body,
            stall_limit_s=settings.request_timeout_s,
            quotas=quotas,
            tracing=tracing,
        )

    @property
    def http_address(self) -> str:
        return _address(self._settings.host, self._http_port)

    @property
    def grpc_address(self) -> str:
        return _address(self._settings.host, self._grpc_port)

    async def __aenter__(self) -> Self:
        """Raises ConfigError naming the setting when a port cannot be had."""
        async with AsyncExitStack() as exits:
            await exits.enter_async_context(background(self._access.follow(), *([self._tls.follow()] if self._tls else [])))
            await exits.enter_async_context(self.readiness)
            http, grpc_server = await self._start_http(exits), await self._start_grpc(exits)
            exits.push_async_callback(self._stop, http, grpc_server)
            self._exits = exits.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._exits.aclose()

    async def _start_http(self, exits: AsyncExitStack) -> HttpServer:
        settings = self._settings
        server = HttpServer(
            build_application(self._service, self._access),
            max_connections=settings.max_connections,
            shutdown_grace_s=settings.drain_s,
        )
        exits.push_async_callback(server.stop)
        host, port = settings.host, settings.http_port
        try:
            tls = None if self._tls is None else self._tls.http
            self._http_port = await server.start(host, port, tls, reuse_port=settings.shares_ports)
        except OSError as error:
            raise _cannot_listen(host, port, "http_port", error) from None
        return server

    async def _start_grpc(self, exits: AsyncExitStack) -> grpc.aio.Server:
        settings = self._settings
        options = server_options(settings.max_body, settings.max_connections, shares_port=settings.shares_ports)
        server = grpc.aio.server(interceptors=[Authentication(self._access)], options=options)
        add_services(server, self._service)
        add_operator_service(server, self._service, self._operator)
        add_reflection(server, OPERATOR_SERVICE_NAME)
        host, port = settings.host, settings.grpc_port
        try:
            # gRPC itself does not tell why it cannot listen.
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.create_server((host, port), family=family, reuse_port=self._settings.shares_ports):
                pass
            address = _address(host, port)
            if self._tls is None:
                self._grpc_port = server.add_insecure_port(address)
            else:
                self._grpc_port = server.add_secure_port(address, self._tls.grpc)
        except OSError as error:
            raise _cannot_listen(host, port, "grpc_port", error) from None
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {_address(host, port)}: {error}", field="grpc_port") from None
        await server.start()
        exits.push_async_callback(server.stop, None)
        return server

    async def _stop(self, http: HttpServer, grpc_server: grpc.aio.Server) -> None:
        self.readiness.drain()
        await asyncio.gather(grpc_server.stop(self._settings.drain_s), http.stop())


def _tls(settings: RouterSettings) -> ServerTls | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    return ServerTls(TlsFiles(settings.tls_cert, settings.tls_key, settings.tls_client_ca))


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _cannot_listen(host: str, port: int, setting: str, error: OSError) -> ConfigError:
    in_use = error.errno == errno.EADDRINUSE
    problem = f"port {port} is in use on {host}" if in_use else f"cannot listen on {_address(host, port)}: {error}"
    return ConfigError(f"{problem}; set --{setting.replace('_', '-')} to another port, or 0 for any free one", field=setting)
