"""What a rank after the first does for the services on rank 0: it gives out tickets for its part of the KV memory, and sends
from it. See kv_transfer/ranks.py, whose requests these are.

Requests are taken in their order, and answered as they are done. Rank 0 sends blocks only once every rank has computed them.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from types import TracebackType
from typing import Self

import zmq
from google.protobuf.message import DecodeError

from kv_transfer.incoming import Incoming
from kv_transfer.push import Push
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.sockets import SocketKeys, bind_receiver
from segue.errors import SegueError
from segue.v1 import ranks_pb2 as pb

logger = logging.getLogger(__name__)


class RankServer:
    """Listens at `endpoint` while it is entered, and answers while it runs. Both ends of the KV are left later."""

    def __init__(self, receiver: KVReceiver, sender: KVSender, host: str, keys: SocketKeys | None = None) -> None:
        self._receiver = receiver
        self._sender = sender
        self._host = host
        self._keys = keys
        self.endpoint = ""
        # By ticket id, until they are fenced.
        self._incoming: dict[int, Incoming] = {}
        # By push id, until they are abandoned, which also those are that were committed.
        self._opening: dict[int, asyncio.Task[None]] = {}
        self._pushes: dict[int, Push] = {}

    @property
    def num_held(self) -> int:
        """Tickets and pushes of which rank 0 has not seen the end."""
        return len(self._incoming) + len(self._opening) + len(self._pushes)

    async def __aenter__(self) -> Self:
        self._context = zmq.Context()
        self._socket, self.endpoint = await bind_receiver(self._context, self._host, 0, keys=self._keys)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._context.destroy(linger=0)

    async def run(self) -> None:
        """Until cancelled. A defect in a request ends it, and with it the rank: rank 0 would wait for the answer for ever."""
        async with asyncio.TaskGroup() as group:
            while True:
                peer, *parts = await self._socket.receive()
                try:
                    request = pb.RankRequest.FromString(parts[0].bytes if parts else b"")
                except DecodeError:
                    logger.warning("a frame that is no request was dropped")
                    continue
                self._take(peer.bytes, request, group)

    def _take(self, peer: bytes, request: pb.RankRequest, group: asyncio.TaskGroup) -> None:
        match request.WhichOneof("message"):
            case "send":
                send = request.send
                if (push := self._pushes.get(send.push_id)) is not None:
                    push.send(send.layer, send.source_blocks, range(send.first_block, send.end_block))
            case "accept":
                self._incoming[request.accept.ticket_id].accept()
            case "open":
                self._opening[request.open.push_id] = group.create_task(self._answer(peer, request))
            case _:
                group.create_task(self._answer(peer, request))

    async def _answer(self, peer: bytes, request: pb.RankRequest) -> None:
        answer = pb.RankAnswer(request_id=request.request_id)
        try:
            await self._do(request, answer)
        except SegueError as error:
            answer.error_code, answer.error = error.code, error.message
        if request.request_id:
            # Rank 0 may be gone; whoever computes here notices.
            with suppress(zmq.ZMQError):
                await self._socket.send([peer, answer.SerializeToString()])

    async def _do(self, request: pb.RankRequest, answer: pb.RankAnswer) -> None:
        match request.WhichOneof("message"):
            case "expect":
                await self._expect(request.expect, answer)
            case "arrival":
                arrival = await self._incoming[request.arrival.ticket_id].arrival()
                answer.first_token, answer.num_bytes = arrival.first_token, arrival.num_bytes
                answer.transport = arrival.transport
            case "fence":
                if (incoming := self._incoming.get(request.fence.ticket_id)) is not None:
                    await incoming.fence()
                    self._incoming.pop(request.fence.ticket_id, None)
            case "open":
                try:
                    self._pushes[request.open.push_id] = await self._sender.open(request.open.ticket)
                finally:
                    del self._opening[request.open.push_id]
            case "commit":
                answer.num_bytes = await self._pushes[request.commit.push_id].commit(request.commit.first_token)
            case "abandon":
                await self._abandon(request.abandon)

    async def _expect(self, expect: pb.ExpectKV, answer: pb.RankAnswer) -> None:
        for incoming in await self._receiver.reserve(expect.first_block, expect.block_ids, expect.num_writers):
            self._incoming[incoming.ticket.ticket_id] = incoming
            # Rank 0 knows its blocks, which may be many.
            answer.tickets.add().CopyFrom(incoming.ticket)
            del answer.tickets[-1].block_ids[:]

    async def _abandon(self, abandon: pb.AbandonPush) -> None:
        if (opening := self._opening.get(abandon.push_id)) is not None:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)
        if (push := self._pushes.get(abandon.push_id)) is not None:
            await push.abandon(abandon.reason)
            self._pushes.pop(abandon.push_id, None)
