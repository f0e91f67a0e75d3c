"""The ranks of one worker find each other, and what the ranks after the first serve.

    rank 0 opens a store, leaves its address in the membership store  →  the others take it  →  all join the collectives
    each loads its share  →  the others listen for rank 0's requests, and say where  →  steps

`WorkerSettings.group` names this very start of the worker, so that no rank of an earlier one can come in. From then on the
ranks live and die together: whichever loses another ends with WorkerLost.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import zmq
from torch._C._distributed_c10d import TCPStore

from deploy.worker_parts import kv_ends, load_engine, socket_keys
from engine.parallel import START_LIMIT, RankGroup, Shard
from kv_transfer.rank_server import RankServer
from kv_transfer.ranks import RemoteRank
from segue.config import WorkerSettings
from segue.errors import ConfigError
from segue.membership import Membership
from segue.models.config import ModelConfig
from segue.runtime import background


@dataclass(frozen=True, slots=True)
class Meeting:
    """A store in which the ranks leave each other words, and the collectives."""

    store: TCPStore
    group: RankGroup

    @classmethod
    async def open(cls, settings: WorkerSettings, membership: Membership, epoch: int) -> Meeting:
        """On rank 0. Raises ConfigError for a number of ranks that the model cannot have and for a host that is not this one,
        WorkerLost when a rank does not come, StoreUnavailable or ModelFileError."""
        ModelConfig.from_dir(settings.model_dir).check_tensor_parallel(settings.num_ranks, settings.num_ranks_field)
        try:
            listener = socket.create_server((settings.host, 0))
        except OSError as error:
            raise ConfigError(f"host: cannot listen on {settings.host}: {error}; give an address of this machine") from None
        port = listener.getsockname()[1]
        store = TCPStore(
            settings.host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=START_LIMIT,
            # Else it would listen at all addresses.
            master_listen_fd=listener.detach(),
        )
        store.set("epoch", str(epoch))
        await membership.leave_address(settings.group, f"{settings.host}:{port}", settings.num_ranks - 1)
        return await cls._gather(store, settings)

    @classmethod
    async def join(cls, settings: WorkerSettings, membership: Membership) -> Meeting:
        """On the others."""
        host, _, port = (await membership.take_address(settings.group)).rpartition(":")
        store = await asyncio.to_thread(TCPStore, host, int(port), is_master=False, timeout=START_LIMIT)
        return await cls._gather(store, settings)

    @classmethod
    async def _gather(cls, store: TCPStore, settings: WorkerSettings) -> Meeting:
        shard = Shard(settings.rank, settings.num_ranks)
        group = await asyncio.to_thread(RankGroup, store, shard, host=settings.host, device=settings.device)
        return cls(store, group)

    async def word(self, name: str) -> str:
        """What some rank leaves, or has left, under this name."""
        found: bytes = await asyncio.to_thread(self.store.get, name)
        return found.decode()


@asynccontextmanager
async def remote_ranks(meeting: Meeting, settings: WorkerSettings) -> AsyncIterator[list[RemoteRank]]:
    """On rank 0: the ways to the other ranks. One that is lost ends the block with WorkerLost."""
    context = zmq.Context()
    try:
        numbers = range(1, meeting.group.shard.size)
        keys = socket_keys(settings)
        ranks = [RemoteRank(context, number, await meeting.word(_endpoint_of(number)), keys) for number in numbers]
        async with background(*(rank.run() for rank in ranks)):
            yield ranks
    finally:
        context.destroy(linger=0)


async def run_rank(settings: WorkerSettings) -> None:
    """A rank after the first, until rank 0 is done. Raises WorkerLost when another rank is gone, and as `serving_worker`."""
    async with AsyncExitStack() as stack:
        async with Membership(settings.redis, settings.cluster_id) as membership:
            meeting = await Meeting.join(settings, membership)
        stack.callback(meeting.group.leave)
        engine, memory = load_engine(settings, meeting.group)
        stack.callback(memory.close)
        # Ends once rank 0 has noticed that this one leaves.
        stack.push_async_callback(asyncio.to_thread, engine.close)
        epoch = int(await meeting.word("epoch"))
        receiver, sender = await stack.enter_async_context(kv_ends(settings, memory, epoch))
        server = await stack.enter_async_context(RankServer(receiver, sender, settings.host, socket_keys(settings)))
        meeting.store.set(_endpoint_of(settings.rank), server.endpoint)
        async with background(server.run()):
            await engine.follow()


def _endpoint_of(rank: int) -> str:
    return f"endpoint of rank {rank}"
