"""The KV memory of a worker of several ranks, as its services on rank 0 see it: one receiver and one sender.

Every rank has a KVReceiver and a KVSender over its own part of the KV. Rank 0's are used as they are; those of the others by
requests (proto/segue/v1/ranks.proto) which kv_transfer/rank_server.py answers. A ticket names the rank that writes for it.

A rank that is gone ends `RemoteRank.run`, and with it the worker: nothing of its KV is of use any more.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import NoReturn

import zmq
from google.protobuf.message import DecodeError

from kv_transfer.handover import IncomingPart, PushPart, Receiver, Sender
from kv_transfer.incoming import Arrival
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.sockets import AsyncSocket, SocketKeys, connected_sender, connection_loss
from segue.errors import TransferRefused, WorkerLost, error_from_code
from segue.runtime import background
from segue.v1 import ranks_pb2 as pb
from segue.v1.transfer_pb2 import Ticket


class RemoteRank:
    """Rank 0's end of the way to another rank, whose RankServer listens at `endpoint`. Nothing is heard before it runs."""

    def __init__(self, context: zmq.SyncContext, rank: int, endpoint: str, keys: SocketKeys | None = None) -> None:
        self._context = context
        self._rank = rank
        self._endpoint = endpoint
        self._keys = keys
        self._ids = itertools.count(1)
        self._outgoing: asyncio.Queue[pb.RankRequest] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[pb.RankAnswer]] = {}
        self._is_lost = False

    async def run(self) -> NoReturn:
        """Until cancelled. Raises WorkerLost when the rank is gone; so do then all requests, also those under way."""
        try:
            with connected_sender(self._context, self._endpoint, self._keys) as (socket, monitor):
                async with background(self._read(socket), self._write(socket)):
                    await connection_loss(monitor)
            raise self._lost()
        finally:
            self._is_lost = True
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(self._lost())

    async def reserve(self, first_block: int, block_ids: Sequence[int], num_writers: int) -> list[IncomingPart]:
        """As KVReceiver.reserve."""
        expect = pb.ExpectKV(first_block=first_block, block_ids=block_ids, num_writers=num_writers)
        answer = await self.ask(pb.RankRequest(expect=expect))
        parts: list[IncomingPart] = []
        for ticket in answer.tickets:
            ticket.block_ids.extend(block_ids)
            parts.append(_RemoteIncoming(self, ticket))
        return parts

    async def open(self, ticket: Ticket) -> PushPart:
        """As KVSender.open."""
        push = _RemotePush(self, ticket, next(self._ids))
        try:
            await self.ask(pb.RankRequest(open=pb.OpenPush(push_id=push.push_id, ticket=ticket)))
        except asyncio.CancelledError:
            self.tell(pb.RankRequest(abandon=pb.AbandonPush(push_id=push.push_id, reason="opening it was given up")))
            raise
        return push

    async def ask(self, request: pb.RankRequest) -> pb.RankAnswer:
        """Raises the error that the rank answers with."""
        if self._is_lost:
            raise self._lost()
        request.request_id = next(self._ids)
        answer: asyncio.Future[pb.RankAnswer] = asyncio.get_running_loop().create_future()
        self._answers[request.request_id] = answer
        self._outgoing.put_nowait(request)
        try:
            return await answer
        finally:
            del self._answers[request.request_id]

    def tell(self, request: pb.RankRequest) -> None:
        self._outgoing.put_nowait(request)

    async def _read(self, socket: AsyncSocket) -> None:
        while True:
            try:
                answer = pb.RankAnswer.FromString((await socket.receive())[0].bytes)
            except DecodeError:
                raise self._lost() from None
            waiting = self._answers.get(answer.request_id)
            if waiting is None or waiting.done():
                continue
            if answer.error_code:
                waiting.set_exception(error_from_code(answer.error_code, answer.error))
            else:
                waiting.set_result(answer)

    async def _write(self, socket: AsyncSocket) -> None:
        while True:
            await socket.send([(await self._outgoing.get()).SerializeToString()])

    def _lost(self) -> WorkerLost:
        return WorkerLost(f"rank {self._rank} of this worker, at {self._endpoint}, is gone")


class _RemoteIncoming:
    def __init__(self, rank: RemoteRank, ticket: Ticket) -> None:
        self.ticket = ticket
        self._rank = rank
        self._name = pb.IncomingName(ticket_id=ticket.ticket_id)

    async def arrival(self) -> Arrival:
        answer = await self._rank.ask(pb.RankRequest(arrival=self._name))
        return Arrival(answer.first_token, answer.num_bytes, None, answer.transport)

    def accept(self) -> None:
        self._rank.tell(pb.RankRequest(accept=self._name))

    async def fence(self) -> None:
        await self._rank.ask(pb.RankRequest(fence=self._name))


class _RemotePush:
    def __init__(self, rank: RemoteRank, ticket: Ticket, push_id: int) -> None:
        self.ticket = ticket
        self.push_id = push_id
        self._rank = rank

    def send(self, layer: int, source_blocks: Sequence[int], blocks: range) -> None:
        send = pb.SendKVPart(
            push_id=self.push_id,
            layer=layer,
            source_blocks=source_blocks,
            first_block=blocks.start,
            end_block=blocks.stop,
        )
        self._rank.tell(pb.RankRequest(send=send))

    async def commit(self, first_token: int, source_blocks: Sequence[int]) -> int:
        commit = pb.CommitPush(push_id=self.push_id, first_token=first_token)
        return (await self._rank.ask(pb.RankRequest(commit=commit))).num_bytes

    async def abandon(self, reason: str) -> None:
        await self._rank.ask(pb.RankRequest(abandon=pb.AbandonPush(push_id=self.push_id, reason=reason)))


class RankedReceiver:
    """The receivers of all ranks as one."""

    def __init__(self, own: KVReceiver, others: Sequence[RemoteRank]) -> None:
        self._own = own
        self._others = others

    async def reserve(self, first_block: int, block_ids: Sequence[int], num_writers: int) -> list[IncomingPart]:
        """As KVReceiver.reserve, of all ranks. When one fails, or the caller is cancelled, nothing stays reserved."""
        ranks: list[Receiver | RemoteRank] = [self._own, *self._others]
        asking = [asyncio.ensure_future(rank.reserve(first_block, block_ids, num_writers)) for rank in ranks]
        try:
            await asyncio.wait(asking)
            return [part for granted in asking for part in granted.result()]
        except BaseException:
            answers = await asyncio.gather(*asking, return_exceptions=True)
            parts = [part for parts in answers if not isinstance(parts, BaseException) for part in parts]
            await asyncio.gather(*(part.fence() for part in parts))
            raise

    def expect_local(self) -> IncomingPart:
        """As KVReceiver.expect_local: the other ranks have the blocks under the same numbers, and move nothing either."""
        return self._own.expect_local()


class RankedSender:
    """The senders of all ranks as one."""

    def __init__(self, own: KVSender, others: Sequence[RemoteRank]) -> None:
        self._ranks: list[Sender] = [own, *others]

    async def open(self, ticket: Ticket) -> PushPart:
        """As KVSender.open, of the rank that the ticket is for."""
        if ticket.writer_rank >= len(self._ranks):
            raise TransferRefused(f"ticket {ticket.ticket_id} is for rank {ticket.writer_rank} of {len(self._ranks)}")
        return await self._ranks[ticket.writer_rank].open(ticket)
