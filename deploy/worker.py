"""`python -m deploy.worker`: one worker process; its settings (segue.config.WorkerSettings) come from the environment.

A role is a service, not a program: the engine (model, KV memory) is loaded once, and the prefill service, the decode service or
both attach to it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio

from decode_worker.service import DecodeService
from deploy.duty import Duty
from deploy.ranks import Meeting, remote_ranks, run_rank
from deploy.worker_health import health_served
from deploy.worker_parts import kv_ends, load_engine
from engine.engine import Engine
from kv_transfer.account import TransferAccount
from kv_transfer.handover import Receiver, Sender
from kv_transfer.ranks import RankedReceiver, RankedSender, RemoteRank
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.tensors import Memory
from prefill_worker.service import PrefillService
from segue.cache_feed import CacheFeed
from segue.cluster_secret import differing_secret
from segue.config import WorkerSettings
from segue.errors import ConfigError
from segue.link_tls import LinkCredentials
from segue.logs import set_up_logging
from segue.membership import Membership, held_lease
from segue.otel import exported_spans
from segue.runtime import Wakeups, background, run_process, say_serving, stop_event
from segue.tracing import Spans
from segue.v1 import worker_pb2
from segue.v1.inference_pb2 import WorkerLoad
from segue.v1.worker_pb2_grpc import add_WorkerServiceServicer_to_server
from segue.worker_link import LINK_OPTIONS, Leg, WorkerLinkServicer

logger = logging.getLogger(__name__)


async def run_worker(settings: WorkerSettings) -> bool:
    """Serves until SIGTERM or SIGINT (a second one: drain no longer), or until an operator has it leave; drains, then returns
    whether it shall be started anew. Raises ModelFileError, ConfigError or StoreUnavailable when it cannot start, and
    WorkerLost when one of its ranks is gone."""
    if settings.rank:
        await run_rank(settings)
        return False
    stop = stop_event()
    async with serving_worker(settings) as worker:
        say_serving(grpc=worker.address)
        async with background(_drain_when_told(worker.duty, stop, settings.drain_s)):
            return await worker.duty.departure == worker_pb2.DEPARTURE_RESTART


async def _drain_when_told(duty: Duty, stop: asyncio.Event, drain_s: float) -> None:
    for grace_s in (drain_s, 0.0):
        await stop.wait()
        stop.clear()
        duty.drain(grace_s, worker_pb2.DEPARTURE_LEAVE)


@asynccontextmanager
async def serving_worker(settings: WorkerSettings) -> AsyncIterator[Worker]:
    """A worker that is announced and serves until the block ends."""
    async with AsyncExitStack() as stack:
        membership = await stack.enter_async_context(Membership(settings.redis, settings.cluster_id))
        epoch = await membership.next_epoch()
        meeting = None
        if settings.num_ranks > 1:
            meeting = await Meeting.open(settings, membership, epoch)
            stack.callback(meeting.group.leave)
        engine, memory = load_engine(settings, meeting.group if meeting is not None else None)
        stack.callback(memory.close)
        stack.callback(engine.close)
        ranks = await stack.enter_async_context(remote_ranks(meeting, settings)) if meeting is not None else []
        spans = await stack.enter_async_context(exported_spans(settings, "segue-worker", settings.worker_id))
        worker = Worker(settings, engine, memory, ranks, epoch, spans)
        await stack.enter_async_context(worker.legs())
        await stack.enter_async_context(worker.server())
        await stack.enter_async_context(held_lease(membership, worker.record, settings.member_lease_ms))
        if settings.health_port is not None:
            health = health_served(bracketed(settings.host), settings.health_port, engine, lambda: worker.duty.draining)
            await stack.enter_async_context(health)
        await _tell_of_other_secrets(membership, worker.record())
        yield worker


@dataclass
class Worker:
    settings: WorkerSettings
    engine: Engine
    memory: Memory
    # Those after the first, which this is.
    ranks: list[RemoteRank]
    epoch: int
    spans: Spans
    address: str = ""
    active_legs: list[Leg] = field(default_factory=list)
    # This process's own; further ranks have theirs.
    kv_ends: list[KVReceiver | KVSender] = field(default_factory=list)
    transfers: TransferAccount = field(default_factory=TransferAccount)
    started_unix_s: float = field(default_factory=time.time)
    # Set while `server` runs.
    duty: Duty = field(init=False)

    @asynccontextmanager
    async def legs(self) -> AsyncIterator[None]:
        """Both services, each with its loop running: which of them gets work is the routers' choice, by the worker's roles."""
        settings, wakeups = self.settings, Wakeups()
        async with AsyncExitStack() as stack:
            own_receiver, own_sender = await stack.enter_async_context(kv_ends(settings, self.memory, self.epoch))
            receiver: Receiver = RankedReceiver(own_receiver, self.ranks) if self.ranks else own_receiver
            sender: Sender = RankedSender(own_sender, self.ranks) if self.ranks else own_sender
            self.kv_ends += [own_receiver, own_sender]
            decode = DecodeService(
                self.engine,
                receiver,
                sender,
                wakeups,
                self.transfers,
                self.spans,
                worker_id=settings.worker_id,
                max_sequences=settings.max_batch,
                max_step_tokens=settings.max_prefill_tokens,
            )
            prefill = PrefillService(
                self.engine,
                sender,
                receiver,
                wakeups,
                self.transfers,
                self.spans,
                max_step_tokens=settings.max_prefill_tokens,
                pulls=settings.kv_pull,
            )
            self.active_legs += [decode, prefill]
            async with background(decode.run(), prefill.run()):
                yield

    @asynccontextmanager
    async def server(self) -> AsyncIterator[None]:
        """Serves links. Raises ConfigError when the port is taken."""
        cache = CacheFeed(lambda: self.engine.pool.published)
        self.engine.pool.listener = cache
        duty = self.duty = Duty(self.settings, self.active_legs)
        servicer = WorkerLinkServicer(self.active_legs, self.record, self.load, cache, duty.handle)
        duty.on_change = servicer.tell_changed
        server = grpc.aio.server(options=LINK_OPTIONS)
        add_WorkerServiceServicer_to_server(servicer, server)
        host, secret = bracketed(self.settings.host), self.settings.secret
        address = f"{host}:{self.settings.grpc_port}"
        try:
            if secret is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, LinkCredentials.of(secret).server)
        except RuntimeError as error:
            raise ConfigError(f"grpc_port: cannot listen on {address}: {error}") from None
        self.address = f"{host}:{port}"
        await server.start()
        try:
            async with background(servicer.tell_of_cache()):
                yield
        finally:
            self.duty.close()
            await server.stop(grace=0.5)

    def record(self) -> worker_pb2.WorkerRecord:
        settings, engine = self.settings, self.engine
        return worker_pb2.WorkerRecord(
            worker_id=settings.worker_id,
            epoch=self.epoch,
            roles=self.duty.roles,
            possible_roles=settings.possible_roles,
            roles_until_unix_s=self.duty.roles_until_unix_s,
            started_unix_s=self.started_unix_s,
            address=self.address,
            pid=os.getpid(),
            host=socket.gethostname(),
            model=settings.model_name,
            layout_fingerprint=engine.layout.fingerprint(),
            max_context=engine.config.max_context,
            vocab_size=engine.config.vocab_size,
            block_size=engine.layout.block_size,
            total_blocks=engine.pool.num_total,
            draining=self.duty.draining,
            num_ranks=engine.layout.num_ranks,
            number_formats=settings.number_formats,
            pulls_kv=settings.kv_pull,
            secret_fingerprint=settings.secret.fingerprint if settings.secret is not None else "",
        )

    def load(self) -> WorkerLoad:
        pool = self.engine.pool
        decode_ms_per_step, decode_ms_per_sequence = self.engine.step_times.decode.line()
        load = WorkerLoad(
            free_blocks=pool.num_free,
            leased_blocks=pool.num_leased,
            cached_blocks=pool.num_cached,
            total_blocks=pool.num_total,
            block_size=self.engine.layout.block_size,
            open_tickets=sum(end.num_open_tickets for end in self.kv_ends),
            step_age_ms=int(self.engine.step_times.age_s * 1000),
            prefill_ms_per_token=self.engine.step_times.prefill.ratio,
            decode_ms_per_step=decode_ms_per_step,
            decode_ms_per_sequence=decode_ms_per_sequence,
        )
        self.transfers.add_load(load)
        for leg in self.active_legs:
            leg.add_load(load)
        return load


def bracketed(host: str) -> str:
    """As it stands before a port."""
    return f"[{host}]" if ":" in host else host


async def _tell_of_other_secrets(membership: Membership, own: worker_pb2.WorkerRecord) -> None:
    """To the log. Not fatal: while a cluster is given a new secret, worker by worker, there are both for a while."""
    for other in await membership.list_workers():
        if problem := differing_secret(f"worker {other.worker_id}", other.secret_fingerprint, own.secret_fingerprint):
            logger.error("%s", problem.message)


async def main() -> None:
    # Whatever keeps this process starts it anew, or does not.
    settings = WorkerSettings.load()
    set_up_logging(settings.log_format, worker_id=settings.worker_id)
    await run_worker(settings)


if __name__ == "__main__":
    sys.exit(run_process(main))
