"""Puts a router together and runs it until it is told to stop."""

from __future__ import annotations

import logging
import os
import resource
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from router.admission import Admission
from router.coordinator import Coordinator
from router.front import Front
from router.operations import Operations
from router.placement import Placement
from router.quotas import Quotas
from router.text import Tokenizer
from router.workers import Workers
from segue.config import LOOPBACK_NAMES, RouterSettings
from segue.membership import Membership, held_lease
from segue.models.config import ModelConfig
from segue.otel import exported_spans
from segue.pools import PoolStore
from segue.quota_store import QuotaStore
from segue.runtime import say_serving, stop_event
from segue.v1 import worker_pb2

logger = logging.getLogger(__name__)


async def run_router(settings: RouterSettings) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests finish. Raises ModelFileError or ConfigError when it
    cannot start."""
    stop = stop_event()
    _allow_many_connections()
    if settings.api_keys_file is None and settings.host not in LOOPBACK_NAMES:
        logger.warning("no API keys: everybody who reaches %s is let in; set SEGUE_API_KEYS_FILE", settings.host)
    async with serving_router(settings) as front:
        say_serving(http=front.http_address, grpc=front.grpc_address)
        await stop.wait()
        logger.info("stopping: no new requests, running ones may finish")


def _allow_many_connections() -> None:
    """As many as the system lets this process have: when they run out, it could not reach its workers either."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@asynccontextmanager
async def serving_router(settings: RouterSettings) -> AsyncIterator[Front]:
    """A router that serves until the block ends."""
    tokenizer = Tokenizer.from_dir(settings.model_dir)
    model_config = ModelConfig.from_dir(settings.model_dir)
    router_id = settings.router_id or f"router-{uuid.uuid4().hex[:8]}"
    async with Membership(settings.redis, settings.cluster_id) as membership:
        async with Workers(membership, router_id, settings.model_name, settings.secret).running() as workers:
            placement = Placement(workers, settings.policy, may_join=settings.disaggregate == "auto")
            admission = Admission(
                workers.fleet,
                max_active=settings.max_active_requests,
                max_waiting=settings.max_waiting_requests,
                max_wait_s=settings.max_wait_s,
            )
            coordinator = Coordinator(
                workers,
                placement,
                admission,
                settings.model_name,
                max_attempts=settings.max_attempts,
                timeout_s=settings.request_timeout_s,
            )
            async with (
                _quotas(settings) as quotas,
                exported_spans(settings, "segue-router", router_id) as spans,
                PoolStore(settings.redis, settings.cluster_id) as pools,
                Front(settings, tokenizer, model_config, coordinator, Operations(workers, pools), quotas, spans) as front,
            ):
                record = worker_pb2.RouterRecord(
                    router_id=router_id,
                    grpc_address=front.grpc_address,
                    http_address=front.http_address,
                    pid=os.getpid(),
                    host=socket.gethostname(),
                )
                async with held_lease(membership, lambda: record, settings.member_lease_ms, must_begin=False):
                    yield front


@asynccontextmanager
async def _quotas(settings: RouterSettings) -> AsyncIterator[Quotas | None]:
    """None where there are no keys that could have limits."""
    if settings.api_keys_file is None:
        yield None
        return
    async with QuotaStore(settings.redis, settings.cluster_id) as store:
        yield Quotas(store)
