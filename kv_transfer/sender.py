"""The prefill side: writes for tickets that decode workers gave out.

push = await sender.open(ticket)
push.send(layer, source_blocks, range(0, 2))       as soon as a layer of some blocks is computed, from any thread
num_bytes = await push.commit(first_token)         or a TransferError
await push.abandon("cancelled")                    at any moment instead
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import zmq

from kv_transfer.connections import LocalConnection, RemoteConnection
from kv_transfer.faults import NO_FAULTS, Faults
from kv_transfer.identity import WorkerIdentity
from kv_transfer.protocol import LOCAL
from kv_transfer.push import Push
from kv_transfer.receiver import KVReceiver
from kv_transfer.sockets import SocketKeys
from kv_transfer.tensors import Memory
from kv_transfer.transports import check_transports
from segue.errors import TransferError, TransferRefused
from segue.v1 import transfer_pb2 as pb

__all__ = ["KVSender", "Push"]

_OPEN_TIMEOUT_S = 5.0


class KVSender:
    """Sends from `memory` while it is entered. `local` is this process's own receiver, if it has one: it must be left last.
    `wire_dtype` is the format in which KV travels over a network, where it is not as the receiver stores it; with `keys`
    both sides of each connection must have them."""

    def __init__(
        self,
        identity: WorkerIdentity,
        memory: Memory,
        *,
        transports: tuple[str, ...] = ("shm", "tcp"),
        local: KVReceiver | None = None,
        wire_dtype: str = "",
        faults: Faults = NO_FAULTS,
        keys: SocketKeys | None = None,
    ) -> None:
        self._identity = identity
        self._memory = memory
        self._transports = check_transports(transports, memory)
        self._faults = faults
        self._keys = keys
        self._local = LocalConnection(local) if local is not None else None
        self._wire_dtype = wire_dtype
        self._sender_id = secrets.randbits(64)
        self._hello_numbers = itertools.count(1)
        # By endpoint; at most one connection is alive for each.
        self._connections: dict[str, RemoteConnection] = {}

    @property
    def num_open_tickets(self) -> int:
        """Opened and not over: what they name may still be read."""
        connections = [*self._connections.values(), *([self._local] if self._local else [])]
        return sum(connection.num_pushes for connection in connections)

    async def __aenter__(self) -> Self:
        self._context = zmq.Context()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-send")
        if self._local is not None:
            self._local.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._local is not None:
            await self._local.close()
        await asyncio.gather(*(connection.close() for connection in self._connections.values()))
        self._thread.shutdown()
        self._context.destroy()

    async def open(self, ticket: pb.Ticket) -> Push:
        """Connects to the ticket's receiver, if that was not done before, and gets its leave to write.

        Raises TransferRefused when the pair cannot work together or the ticket is not honoured (any more), TransferError when
        the receiver does not answer or is lost.
        """
        if ticket.layout_fingerprint != self._identity.layout_fingerprint:
            raise TransferRefused(
                f"{ticket.decode_worker_id} and {self._identity.worker_id} have different KV layouts or models"
            )
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT_S):
                if ticket.endpoint == f"{LOCAL}:":
                    return await self._open_local(ticket)
                connection = self._connection_to(ticket)
                await connection.ready.wait()
                if connection.failure is not None:
                    raise connection.failure.error()
                push = Push(ticket, connection, self._thread)
                await push.open()
                return push
        except TimeoutError:
            message = f"{ticket.decode_worker_id} at {ticket.endpoint} did not answer within {_OPEN_TIMEOUT_S:g} s"
            raise TransferError(message) from None

    async def _open_local(self, ticket: pb.Ticket) -> Push:
        if self._local is None:
            raise TransferRefused(f"ticket {ticket.ticket_id} is for a sender within {ticket.decode_worker_id} itself")
        push = Push(ticket, self._local, self._thread)
        await push.open()
        return push

    def _connection_to(self, ticket: pb.Ticket) -> RemoteConnection:
        """A connection to the ticket's receiver in its present life: a later epoch replaces an earlier one."""
        connection = self._connections.get(ticket.endpoint)
        if connection is not None and connection.failure is None and connection.epoch > ticket.decode_epoch:
            raise TransferRefused(
                f"the ticket is of {ticket.decode_worker_id}, epoch {ticket.decode_epoch}; "
                f"by now it is at epoch {connection.epoch}"
            )
        if connection is None or connection.failure is not None or connection.epoch < ticket.decode_epoch:
            replaced = connection
            connection = RemoteConnection(
                self._context,
                ticket,
                self._identity,
                self._memory,
                self._transports,
                self._sender_id,
                self._wire_dtype,
                self._hello_numbers,
                self._faults,
                self._keys,
            )
            connection.start(after=replaced)
            self._connections[ticket.endpoint] = connection
        return connection
