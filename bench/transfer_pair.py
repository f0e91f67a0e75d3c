"""The receiving side of bench.transfer, in this process, and the writer that it asks: one pair of real processes.

ticket → open → send → commit → receipt        over shm or tcp, the bytes compared with the writer's afterwards
memcpy, a plain TCP socket                     the floors: the same bytes in one copy, and through one socket
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import sys
import time
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from bench.asked import AskedProcess
from bench.transfer_cases import Case
from kv_transfer.identity import WorkerIdentity
from kv_transfer.memory import KVMemory
from kv_transfer.pieces import Pieces, address_of, checksums
from kv_transfer.receiver import Arrival, Incoming, KVReceiver
from segue.errors import InternalError


class TransferPair:
    """`async with TransferPair(case) as pair`: both processes, with their memories filled. Seconds come from the writer."""

    def __init__(self, case: Case) -> None:
        self._case = case
        # Blocks in no order, as those of a cache that has served for a while.
        self._blocks = [int(block) for block in np.random.default_rng(0).permutation(case.num_blocks)]
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        case = self._case
        self._source, self._target = _filled(self._stack, case), _filled(self._stack, case)
        self._writer = await self._stack.enter_async_context(
            AskedProcess("transfer-writer", [sys.executable, "-m", "bench.transfer_writer"])
        )
        identity = WorkerIdentity("decode-0", 1, case.layout.fingerprint())
        receiver = KVReceiver(identity, self._target, host="127.0.0.1")
        self._receiver = await self._stack.enter_async_context(receiver)
        self._listener = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._connection: socket.socket | None = None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def transfer_s(self, transport: str) -> float:
        """From the first `send` to the receipt. Raises InternalError when other bytes arrived than were sent."""
        target = _bytes_of(self._target)
        target[:] = 0
        incoming = self._receiver.expect(0, self._blocks)
        ticket = incoming.ticket.SerializeToString().hex()
        seconds, arrival = await asyncio.gather(self._ask(transport, ticket=ticket), _taken_over(incoming))
        arrived = target.reshape(self._case.layout.num_layers, self._case.num_blocks, -1)[:, self._blocks]
        if arrival.transport != transport or not np.array_equal(arrived.reshape(-1), _bytes_of(self._source)):
            raise InternalError(f"{self._case.num_bytes} bytes over {arrival.transport} are not what was sent over {transport}")
        return seconds

    async def raw_tcp_s(self) -> float:
        """The writer's sendall() until it has read one byte of answer, which follows the last recv_into()."""
        received = asyncio.get_running_loop().run_in_executor(None, self._receive_raw)
        seconds = await self._ask("raw", port=self._listener.getsockname()[1])
        await received
        return seconds

    async def memcpy_s(self) -> float:
        source, target = address_of(_bytes_of(self._source)), address_of(_bytes_of(self._target))
        begin_s = time.perf_counter()
        ctypes.memmove(target, source, self._case.num_bytes)
        return time.perf_counter() - begin_s

    async def checksum_s(self) -> float:
        size = self._case.layout.region_bytes
        pieces = Pieces.of([self._source.buffer], size)
        begin_s = time.perf_counter()
        checksums(pieces, size)
        return time.perf_counter() - begin_s

    async def _ask(self, transport: str, **fields: str | int) -> float:
        answer = await self._writer.ask({"case": self._case.to_json(), "transport": transport, **fields})
        return float(answer["seconds"])

    def _receive_raw(self) -> None:
        if self._connection is None:
            self._connection = self._stack.enter_context(self._listener.accept()[0])
        received = 0
        while received < self._case.num_bytes:
            count = self._connection.recv_into(self._target.buffer[received:])
            if not count:
                raise InternalError("the writer closed its socket")
            received += count
        self._connection.sendall(b"!")


async def _taken_over(incoming: Incoming) -> Arrival:
    arrival = await incoming.arrival()
    incoming.accept()
    return arrival


def _filled(stack: AsyncExitStack, case: Case) -> KVMemory:
    memory = stack.enter_context(case.allocate())
    _bytes_of(memory)[:] = case.content()
    return memory


def _bytes_of(memory: KVMemory) -> npt.NDArray[np.uint8]:
    return np.frombuffer(memory.buffer, np.uint8)
