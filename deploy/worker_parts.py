"""What every rank of a worker has: an engine, its KV memory, and the two ends of KV transfers over it."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from engine.calibration import load_calibration
from engine.engine import Engine
from engine.kv_cache import TORCH_DTYPES, KVCache
from engine.layout import kv_layout
from engine.parallel import WHOLE, RankGroup
from engine.weights import WeightFormats
from kv_transfer.faults import NO_FAULTS, Faults, InjectedFaults
from kv_transfer.identity import WorkerIdentity
from kv_transfer.memory import KVMemory
from kv_transfer.protocol import DIST, SHM, TCP
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.sockets import SocketKeys
from kv_transfer.tensors import DeviceMemory, Memory
from segue.chaos import Chaos, ChaosSpec
from segue.config import WorkerSettings
from segue.errors import ConfigError
from segue.kv_layout import KVLayout
from segue.models.config import ModelConfig
from segue.models.store import model_revision

logger = logging.getLogger(__name__)


def load_engine(settings: WorkerSettings, group: RankGroup | None) -> tuple[Engine, Memory]:
    """Of the worker, or of this rank of it. Raises ModelFileError or ConfigError."""
    config = ModelConfig.from_dir(settings.model_dir)
    shard = WHOLE if group is None else group.shard
    layout = kv_layout(config, settings.own_kv, model_revision(settings.model_dir), shard)
    # The ranks share the worker's memory out, and have equally many blocks.
    block_bytes = layout.block_bytes * layout.num_ranks
    num_blocks = settings.kv_memory // block_bytes
    if num_blocks < 2:
        raise ConfigError(
            f"kv_memory: {settings.kv_memory} bytes hold {num_blocks} blocks of {block_bytes} bytes; give it more"
        )
    memory = _allocate(settings.device, layout, num_blocks)
    formats = WeightFormats(
        TORCH_DTYPES[settings.dtype],
        settings.own_quantization,
        frozenset(settings.keep_float),
        load_calibration(settings.model_dir) if settings.own_quantization != "none" else {},
    )
    engine = Engine.load(
        settings.model_dir,
        config,
        KVCache(memory.tensor, layout, num_blocks),
        formats,
        group,
        threads=settings.threads or os.cpu_count() or 1,
    )
    return engine, memory


def _allocate(device: str, layout: KVLayout, num_blocks: int) -> Memory:
    return KVMemory.allocate(layout, num_blocks) if device == "cpu" else DeviceMemory.allocate(layout, num_blocks, device)


@asynccontextmanager
async def kv_ends(settings: WorkerSettings, memory: Memory, epoch: int) -> AsyncIterator[tuple[KVReceiver, KVSender]]:
    """Both in every worker: prompts' KV goes to decode, and what decode has of a conversation goes back to prefill."""
    name = f"{settings.worker_id}/{settings.rank}" if settings.rank else settings.worker_id
    identity = WorkerIdentity(name, epoch, memory.layout.fingerprint())
    transports: tuple[str, ...] = (settings.kv_transport,)
    if settings.kv_transport == "auto":
        transports = (SHM, TCP) if settings.device == "cpu" else (DIST,)
    faults, keys = _faults(settings, name), socket_keys(settings)
    async with KVReceiver(
        identity,
        memory,
        host=settings.host,
        # Every rank takes KV: those of one worker may have one host.
        port=settings.kv_port + settings.rank if settings.kv_port else 0,
        transports=transports,
        lease_ms=settings.ticket_lease_ms,
        wire_dtype=settings.wire_dtype,
        faults=faults,
        keys=keys,
    ) as receiver:
        async with KVSender(
            identity, memory, transports=transports, local=receiver, wire_dtype=settings.wire_dtype, faults=faults, keys=keys
        ) as sender:
            yield receiver, sender


def socket_keys(settings: WorkerSettings) -> SocketKeys | None:
    """Of KV sockets and rank sockets."""
    return SocketKeys.of(settings.secret) if settings.secret is not None and settings.kv_encryption else None


def _faults(settings: WorkerSettings, name: str) -> Faults:
    """Those of one rank, which is a process of its own."""
    if not settings.chaos:
        return NO_FAULTS
    logger.warning("chaos: %s", settings.chaos)
    return InjectedFaults(Chaos(ChaosSpec.parse(settings.chaos), name, settings.roles))
