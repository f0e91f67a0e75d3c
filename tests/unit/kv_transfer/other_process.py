"""The other side of test_two_processes: `write|hang TRANSPORT TICKET`, or `receive`."""

from __future__ import annotations

import asyncio
import sys
import threading

import uvloop

from kv_transfer import push as pushes
from kv_transfer.identity import WorkerIdentity
from kv_transfer.memory import KVMemory
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.transports import ShmWriter, TcpWriter
from segue.kv_layout import KVLayout
from segue.v1 import transfer_pb2 as pb

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32", model_revision="test")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def hang_while_writing() -> None:
    def write(writer: object, parcel: object, regions: object) -> None:
        say("writing")
        threading.Event().wait()

    pushes.is_quick = lambda transport, form, layout: False  # the event loop goes on
    for kind in (ShmWriter, TcpWriter):
        kind.write = write


async def write(transport: str, ticket: pb.Ticket, memory: KVMemory) -> None:
    for layer in range(LAYOUT.num_layers):
        for block in range(2):
            memory.region(layer, block)[:] = bytes([10 * layer + block]) * LAYOUT.region_bytes
    async with KVSender(WorkerIdentity("prefill-1", 1, LAYOUT.fingerprint()), memory, transports=(transport,)) as sender:
        push = await sender.open(ticket)
        for layer in range(LAYOUT.num_layers):
            push.send(layer, [0, 1], range(len(ticket.block_ids)))
        revoked = asyncio.create_task(push.revoked.wait())
        revoked.add_done_callback(lambda _: say("revoked"))
        say(f"{push.transport} {await push.commit(1)}")


async def receive(memory: KVMemory) -> None:
    async with KVReceiver(WorkerIdentity("decode-1", 1, LAYOUT.fingerprint()), memory, host="127.0.0.1") as receiver:
        incoming = receiver.expect(0, [0])
        say(incoming.ticket.SerializeToString().hex())
        await incoming.arrival()


def main() -> None:
    with KVMemory.allocate(LAYOUT, 2) as memory:
        if sys.argv[1] == "receive":
            uvloop.run(receive(memory))
            return
        if sys.argv[1] == "hang":
            hang_while_writing()
        uvloop.run(write(sys.argv[2], pb.Ticket.FromString(bytes.fromhex(sys.argv[3])), memory))


if __name__ == "__main__":
    main()
