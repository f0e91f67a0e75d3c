"""The writing side of bench.transfer, a process of its own: `python -m bench.transfer_writer`, asked by lines on stdin.

{"case": {...}, "transport": "shm", "ticket": "0a..."}  →  {"seconds": ...}  from the first `send` to the receipt
{"case": {...}, "transport": "raw", "port": 4711}       →  {"seconds": ...}  the same bytes over a plain TCP socket
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import uvloop

from bench.transfer_cases import Case
from kv_transfer.identity import WorkerIdentity
from kv_transfer.memory import KVMemory
from kv_transfer.sender import KVSender
from segue.v1 import transfer_pb2 as pb


class Writer:
    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._memories: dict[Case, KVMemory] = {}
        self._senders: dict[tuple[Case, str], KVSender] = {}
        self._sockets: dict[int, socket.socket] = {}

    async def answer(self, request: Mapping[str, Any]) -> float:
        case, transport = Case.from_json(request["case"]), request["transport"]
        if transport == "raw":
            return self._raw_s(case, request["port"])
        return await self._transfer_s(case, transport, pb.Ticket.FromString(bytes.fromhex(request["ticket"])))

    async def _transfer_s(self, case: Case, transport: str, ticket: pb.Ticket) -> float:
        sender = await self._sender(case, transport)
        push = await sender.open(ticket)
        begin_s = time.perf_counter()
        for layer in range(case.layout.num_layers):
            push.send(layer, range(case.num_blocks), range(case.num_blocks))
        await push.commit(first_token=1)
        return time.perf_counter() - begin_s

    def _raw_s(self, case: Case, port: int) -> float:
        if port not in self._sockets:
            self._sockets[port] = self._stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        connection, memory = self._sockets[port], self._memory(case)
        begin_s = time.perf_counter()
        connection.sendall(memory.buffer)
        connection.recv(1)
        return time.perf_counter() - begin_s

    def _memory(self, case: Case) -> KVMemory:
        if case not in self._memories:
            memory = self._memories[case] = self._stack.enter_context(case.allocate())
            np.frombuffer(memory.buffer, np.uint8)[:] = case.content()
        return self._memories[case]

    async def _sender(self, case: Case, transport: str) -> KVSender:
        if (case, transport) not in self._senders:
            identity = WorkerIdentity("prefill-0", 1, case.layout.fingerprint())
            sender = KVSender(identity, self._memory(case), transports=(transport,))
            self._senders[case, transport] = await self._stack.enter_async_context(sender)
        return self._senders[case, transport]


async def main() -> None:
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        writer = Writer(stack)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            seconds = await writer.answer(json.loads(line))
            sys.stdout.write(json.dumps({"seconds": seconds}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    uvloop.run(main())
