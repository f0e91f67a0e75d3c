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
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio

from decode_worker.service import DecodeService
from engine.calibration import load_calibration
from engine.engine import Engine
from engine.kv_cache import TORCH_DTYPES
from engine.layout import kv_layout
from engine.weights import WeightFormats
from kv_transfer.identity import WorkerIdentity
from kv_transfer.memory import KVMemory
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from prefill_worker.service import PrefillService
from segue.config import WorkerSettings
from segue.errors import ConfigError
from segue.membership import Membership, held_lease
from segue.models.config import ModelConfig
from segue.models.store import model_revision
from segue.runtime import Wakeups, background, run_process, say_serving, stop_event
from segue.v1 import worker_pb2
from segue.v1.inference_pb2 import WorkerLoad
from segue.v1.worker_pb2_grpc import add_WorkerServiceServicer_to_server
from segue.worker_link import LINK_OPTIONS, Leg, WorkerLinkServicer

logger = logging.getLogger(__name__)

# How long a worker that was told to stop waits for the sequences it has.
DRAIN_TIMEOUT_S = 60.0
_BOTH_TRANSPORTS = ("shm", "tcp")


async def run_worker(settings: WorkerSettings) -> None:
    """Serves until SIGTERM or SIGINT, drains (until done, or a second signal), then returns. Raises ModelFileError,
    ConfigError or StoreUnavailable when it cannot start."""
    stop = stop_event()
    async with serving_worker(settings) as worker:
        say_serving(grpc=worker.address)
        await stop.wait()
        stop.clear()
        await worker.drain(cut_short=stop)


@asynccontextmanager
async def serving_worker(settings: WorkerSettings) -> AsyncIterator[Worker]:
    """A worker that is announced and serves until the block ends."""
    async with AsyncExitStack() as stack:
        membership = await stack.enter_async_context(Membership(settings.redis, settings.cluster_id))
        engine, memory = _load(settings)
        stack.callback(memory.close)
        stack.callback(engine.close)
        worker = Worker(settings, engine, memory, epoch=await membership.next_epoch())
        await stack.enter_async_context(worker.legs())
        await stack.enter_async_context(worker.server())
        await stack.enter_async_context(held_lease(membership, worker.record, settings.member_lease_ms))
        yield worker


def _load(settings: WorkerSettings) -> tuple[Engine, KVMemory]:
    if settings.device != "cpu" and set(settings.roles) != {"prefill", "decode"}:
        raise ConfigError("device: KV cannot be handed over from a GPU's memory yet; run cuda workers with --colocated")
    config = ModelConfig.from_dir(settings.model_dir)
    layout = kv_layout(config, settings.own_kv, model_revision(settings.model_dir))
    num_blocks = settings.kv_memory // layout.block_bytes
    if num_blocks < 2:
        raise ConfigError(
            f"kv_memory: {settings.kv_memory} bytes hold {num_blocks} blocks of {layout.block_bytes} bytes; give it more"
        )
    memory = KVMemory.allocate(layout, num_blocks)
    formats = WeightFormats(
        TORCH_DTYPES[settings.dtype],
        settings.own_quantization,
        frozenset(settings.keep_float),
        load_calibration(settings.model_dir) if settings.own_quantization != "none" else {},
    )
    engine = Engine.load(
        settings.model_dir,
        config,
        layout,
        num_blocks,
        memory.buffer,
        formats,
        threads=settings.threads or os.cpu_count() or 1,
        device=settings.device,
    )
    return engine, memory


@dataclass
class Worker:
    settings: WorkerSettings
    engine: Engine
    memory: KVMemory
    epoch: int
    address: str = ""
    draining: bool = False
    active_legs: list[Leg] = field(default_factory=list)
    servicer: WorkerLinkServicer | None = None

    @asynccontextmanager
    async def legs(self) -> AsyncIterator[None]:
        """The services of this worker's roles, each with its loop running."""
        settings, wakeups = self.settings, Wakeups()
        identity = WorkerIdentity(settings.worker_id, self.epoch, self.engine.layout.fingerprint())
        transports = _BOTH_TRANSPORTS if settings.kv_transport == "auto" else (settings.kv_transport,)
        loops = []
        async with AsyncExitStack() as stack:
            # Both in every worker: prompts' KV goes to decode, and what decode has of a conversation goes back to prefill.
            receiver = await stack.enter_async_context(
                KVReceiver(
                    identity,
                    self.memory,
                    host=settings.host,
                    transports=transports,
                    lease_ms=settings.ticket_lease_ms,
                    wire_dtype=settings.wire_dtype,
                )
            )
            sender = await stack.enter_async_context(
                KVSender(identity, self.memory, transports=transports, local=receiver, wire_dtype=settings.wire_dtype)
            )
            if "decode" in settings.roles:
                decode = DecodeService(
                    self.engine,
                    receiver,
                    sender,
                    wakeups,
                    worker_id=settings.worker_id,
                    max_sequences=settings.max_batch,
                    max_step_tokens=settings.max_prefill_tokens,
                )
                self.active_legs.append(decode)
                loops.append(decode.run())
            if "prefill" in settings.roles:
                prefill = PrefillService(
                    self.engine,
                    sender,
                    receiver,
                    wakeups,
                    max_step_tokens=settings.max_prefill_tokens,
                    pulls=settings.kv_pull,
                )
                self.active_legs.append(prefill)
                loops.append(prefill.run())
            async with background(*loops):
                yield

    @asynccontextmanager
    async def server(self) -> AsyncIterator[None]:
        """Serves links on a port that the system picks."""
        self.servicer = WorkerLinkServicer(self.active_legs, self.record, self.load)
        server = grpc.aio.server(options=LINK_OPTIONS)
        add_WorkerServiceServicer_to_server(self.servicer, server)
        port = server.add_insecure_port(f"{self.settings.host}:0")
        self.address = f"{self.settings.host}:{port}"
        await server.start()
        try:
            yield
        finally:
            await server.stop(grace=0.5)

    async def drain(self, cut_short: asyncio.Event) -> None:
        """Takes nothing new, tells every router so, and waits for what runs, DRAIN_TIMEOUT_S at most."""
        self.draining = True
        logger.info("draining: %d sequences to finish", sum(leg.num_sequences for leg in self.active_legs))
        if self.servicer is not None:
            self.servicer.start_draining()
        finished = asyncio.create_task(self._wait_empty())
        told_again = asyncio.create_task(cut_short.wait())
        await asyncio.wait({finished, told_again}, timeout=DRAIN_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if not finished.done():
            logger.warning("leaving with sequences unfinished")
        finished.cancel()
        told_again.cancel()

    async def _wait_empty(self) -> None:
        for leg in self.active_legs:
            await leg.wait_empty()

    def record(self) -> worker_pb2.WorkerRecord:
        settings, engine = self.settings, self.engine
        return worker_pb2.WorkerRecord(
            worker_id=settings.worker_id,
            epoch=self.epoch,
            roles=settings.roles,
            address=self.address,
            pid=os.getpid(),
            host=socket.gethostname(),
            model=settings.model_name,
            layout_fingerprint=engine.layout.fingerprint(),
            max_context=engine.config.max_context,
            vocab_size=engine.config.vocab_size,
            block_size=engine.layout.block_size,
            total_blocks=engine.pool.num_total,
            draining=self.draining,
            num_ranks=engine.layout.num_ranks,
        )

    def load(self) -> WorkerLoad:
        pool = self.engine.pool
        load = WorkerLoad(
            free_blocks=pool.num_free,
            leased_blocks=pool.num_leased,
            cached_blocks=pool.num_cached,
            total_blocks=pool.num_total,
            block_size=self.engine.layout.block_size,
        )
        for leg in self.active_legs:
            leg.add_load(load)
        return load


async def main() -> None:
    await run_worker(WorkerSettings.load())


if __name__ == "__main__":
    sys.exit(run_process(main))
