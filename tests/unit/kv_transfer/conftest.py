from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

from kv_transfer.identity import WorkerIdentity
from kv_transfer.memory import KVMemory
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from segue.kv_layout import KVLayout

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32", model_revision="test")


class Pair:
    """A prefill and a decode worker's memories, with random bytes in the first, and what connects them."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.layout = LAYOUT
        self.source = stack.enter_context(KVMemory.allocate(LAYOUT, 24))
        self.target = stack.enter_context(KVMemory.allocate(LAYOUT, 32))
        random = np.random.default_rng(7)
        np.frombuffer(self.source.buffer, np.uint8)[:] = random.integers(0, 256, self.source.num_bytes, np.uint8)

    async def receiver(self, *, epoch: int = 3, **options: Any) -> KVReceiver:
        identity = WorkerIdentity("decode-0", epoch, LAYOUT.fingerprint())
        return await self._stack.enter_async_context(KVReceiver(identity, self.target, host="127.0.0.1", **options))

    async def sender(self, *, fingerprint: str | None = None, **options: Any) -> KVSender:
        identity = WorkerIdentity("prefill-0", 1, fingerprint or LAYOUT.fingerprint())
        return await self._stack.enter_async_context(KVSender(identity, self.source, **options))

    def assert_equal(self, sources: list[int], targets: list[int]) -> None:
        for layer in range(self.layout.num_layers):
            for source, target in zip(sources, targets, strict=True):
                assert self.source.region(layer, source) == self.target.region(layer, target)

    def assert_untouched(self, except_blocks: list[int]) -> None:
        for layer in range(self.layout.num_layers):
            for block in set(range(self.target.num_blocks)) - set(except_blocks):
                assert not any(self.target.region(layer, block)), f"layer {layer}, block {block} was written"


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        yield Pair(stack)


@pytest.fixture
def transfer_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop copies and checks nothing itself."""
    for module in ("push", "receiver"):
        monkeypatch.setattr(f"kv_transfer.{module}.is_quick", lambda transport, form, layout: False)


@pytest.fixture(params=["shm", "tcp", "shm on threads", "tcp on threads"])
def transport(request: pytest.FixtureRequest) -> str:
    name, _, threads = str(request.param).partition(" ")
    if threads:
        request.getfixturevalue("transfer_threads")
    return name
