"""Transfers between two processes, one of which is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from segue.errors import TransferError
from segue.v1 import transfer_pb2 as pb

TIMEOUT_S = 60
PROGRAM = Path(__file__).with_name("other_process.py")


@contextlib.asynccontextmanager
async def other_process(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAM), *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def read_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S)).decode().strip()


def encode(ticket: pb.Ticket) -> str:
    return ticket.SerializeToString().hex()


async def transferred(incoming: Any) -> None:
    await asyncio.wait_for(incoming.arrival(), TIMEOUT_S)
    incoming.accept()


async def test_another_process_writes(pair, transport):
    receiver = await pair.receiver()
    incoming = receiver.expect(0, [3, 9])
    async with other_process("write", transport, encode(incoming.ticket)) as writer:
        await transferred(incoming)
        assert await read_line(writer) == f"{transport} {2 * pair.layout.block_bytes}"
    for layer in range(pair.layout.num_layers):
        for index, block in enumerate((3, 9)):
            assert pair.target.region(layer, block) == bytes([10 * layer + index]) * pair.layout.region_bytes
    pair.assert_untouched(except_blocks=[3, 9])


async def test_a_writer_killed_in_the_middle_of_a_write_in_place(pair):
    names_before = os.listdir("/dev/shm")
    receiver = await pair.receiver()
    incoming = receiver.expect(0, [3, 9])
    async with other_process("hang", "shm", encode(incoming.ticket)) as writer:
        assert await read_line(writer) == "writing"
        fencing = asyncio.create_task(incoming.fence())
        assert await read_line(writer) == "revoked"
        assert not fencing.done()
        writer.kill()
        await asyncio.wait_for(fencing, TIMEOUT_S)
    with pytest.raises(TransferError):
        await incoming.arrival()
    assert os.listdir("/dev/shm") == names_before


async def test_a_killed_writer_ends_its_tickets(pair, transport):
    receiver = await pair.receiver()
    incoming, untouched = receiver.expect(0, [3, 9]), receiver.expect(0, [4])
    async with other_process("hang", transport, encode(incoming.ticket)) as writer:
        assert await read_line(writer) == "writing"
        writer.kill()
        with pytest.raises(TransferError, match="lost"):
            await asyncio.wait_for(incoming.arrival(), TIMEOUT_S)
        await asyncio.wait_for(incoming.fence(), TIMEOUT_S)
    assert untouched.state.failure is None
    async with other_process("write", transport, encode(untouched.ticket)):
        await transferred(untouched)


async def test_a_killed_receiver_ends_the_pushes_to_it(pair, transport):
    sender = await pair.sender(transports=(transport,))
    async with other_process("receive") as receiver:
        ticket = pb.Ticket.FromString(bytes.fromhex(await read_line(receiver)))
        push = await sender.open(ticket)
        push.send(0, [0], range(1))
        receiver.kill()
        await asyncio.wait_for(push.revoked.wait(), TIMEOUT_S)
        with pytest.raises(TransferError, match="lost"):
            await push.commit(1)
        with pytest.raises(TransferError):
            await asyncio.wait_for(sender.open(ticket), TIMEOUT_S)
