"""The prefill side: writes for tickets that decode workers gave out.

push = await sender.open(ticket)
push.send(layer, [(source block, index), ...])     as soon as a layer of some blocks is computed, from any thread
num_bytes = await push.commit(first_token)         or a TransferError
await push.abandon("cancelled")                    at any moment instead
"""

from __future__ import annotations

import asyncio
import secrets
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import zmq.asyncio

from kv_transfer.identity import WorkerIdentity
from kv_transfer.links import LocalLink, RemoteLink
from kv_transfer.memory import KVMemory
from kv_transfer.protocol import LOCAL
from kv_transfer.push import Push
from kv_transfer.receiver import KVReceiver
from kv_transfer.transports import check_transports
from segue.errors import TransferError, TransferRefused
from segue.v1 import transfer_pb2 as pb

__all__ = ["KVSender", "Push"]

_OPEN_TIMEOUT_S = 5.0


class KVSender:
    """Sends from `memory` while it is entered. `local` is this process's own receiver, if it has one: it must be left last."""

    def __init__(
        self,
        identity: WorkerIdentity,
        memory: KVMemory,
        *,
        transports: tuple[str, ...] = ("shm", "tcp"),
        local: KVReceiver | None = None,
    ) -> None:
        self._identity = identity
        self._memory = memory
        self._transports = check_transports(transports)
        self._local = LocalLink(local) if local is not None else None
        self._sender_id = secrets.randbits(64)
        # By endpoint; at most one link is alive for each.
        self._links: dict[str, RemoteLink] = {}

    async def __aenter__(self) -> Self:
        self._context = zmq.asyncio.Context()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-send")
        if self._local is not None:
            self._local.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._local is not None:
            await self._local.close()
        await asyncio.gather(*(link.close() for link in self._links.values()))
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
                link = self._link_to(ticket)
                await link.ready.wait()
                if link.failure is not None:
                    raise link.failure.error()
                push = Push(ticket, link, self._memory, self._thread)
                await push.open()
                return push
        except TimeoutError:
            message = f"{ticket.decode_worker_id} at {ticket.endpoint} did not answer within {_OPEN_TIMEOUT_S:g} s"
            raise TransferError(message) from None

    async def _open_local(self, ticket: pb.Ticket) -> Push:
        if self._local is None:
            raise TransferRefused(f"ticket {ticket.ticket_id} is for a sender within {ticket.decode_worker_id} itself")
        push = Push(ticket, self._local, self._memory, self._thread)
        await push.open()
        return push

    def _link_to(self, ticket: pb.Ticket) -> RemoteLink:
        """A link to the ticket's receiver in its present life: a later epoch replaces an earlier one."""
        link = self._links.get(ticket.endpoint)
        if link is not None and link.failure is None and link.epoch > ticket.decode_epoch:
            raise TransferRefused(
                f"the ticket is of {ticket.decode_worker_id}, epoch {ticket.decode_epoch}; it is at epoch {link.epoch} by now"
            )
        if link is None or link.failure is not None or link.epoch < ticket.decode_epoch:
            replaced = link
            link = RemoteLink(self._context, ticket, self._identity, self._memory, self._transports, self._sender_id)
            link.start(after=replaced)
            self._links[ticket.endpoint] = link
        return link
