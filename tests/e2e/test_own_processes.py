"""`segue router` and `segue worker`: processes that somebody else starts, configured by their environment alone."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import httpx

from deploy.child import Child, FirstWord
from deploy.health import complaint
from deploy.probe import until_ready
from deploy.valkey import Valkey, embedded_valkey
from tests.support.tiny_model import make_tiny_model
from tests.unit.deploy.conftest import descendants, free_port

SEGUE = str(Path(sys.executable).with_name("segue"))
LIMIT_S = 60.0


class Processes:
    """Of one cluster, with the tiny model."""

    def __init__(self, folder: Path, valkey: Valkey) -> None:
        self._folder = folder
        self.env = {
            "SEGUE_MODEL": str(make_tiny_model(folder / "tiny")),
            "SEGUE_MODEL_NAME": "named",
            "SEGUE_HOME": str(folder),
            "SEGUE_REDIS": valkey.url,
            "SEGUE_CLUSTER_ID": "c",
            "SEGUE_HTTP_PORT": "0",
            "SEGUE_GRPC_PORT": "0",
            "SEGUE_KV_MEMORY": "2MiB",
        }

    async def start(self, name: str, **env: str) -> tuple[Child, FirstWord]:
        said = FirstWord()
        log = self._folder / f"{name}.log"
        return await Child.start(name, (SEGUE, name), log=log, env=self.env | env, on_line=said.on_line), said


async def test_a_cluster_of_single_processes(tmp_path: Path) -> None:
    async with asyncio.timeout(LIMIT_S), embedded_valkey(tmp_path / "valkey.log") as valkey:
        processes = Processes(tmp_path, valkey)
        health_port = str(free_port())
        ranks = {"SEGUE_PREFILL_TP": "2", "SEGUE_THREADS": "1", "SEGUE_HEALTH_PORT": health_port}
        worker, worker_said = await processes.start("worker", SEGUE_ROLES="prefill,decode", **ranks)
        router, router_said = await processes.start("router")
        http = (await router_said.of(router))["http"]
        await worker_said.of(worker)
        await until_ready(http)

        async with httpx.AsyncClient(base_url=f"http://{http}") as client:
            body = {"model": "named", "prompt": "Hello", "max_tokens": 8, "temperature": 0}
            answer = await client.post("/v1/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == 8

        worker_env = {"SEGUE_ROLES": "prefill,decode", "SEGUE_HEALTH_PORT": health_port}
        assert await asyncio.to_thread(complaint, worker_env) == ""
        assert await asyncio.to_thread(complaint, {"SEGUE_HTTP_PORT": http.rpartition(":")[2]}) == ""

        for process in (router, worker):
            process.signal(signal.SIGTERM)
            assert await asyncio.shield(process.exited) == 0


async def test_a_worker_ends_when_one_of_its_ranks_does(tmp_path: Path) -> None:
    async with asyncio.timeout(LIMIT_S), embedded_valkey(tmp_path / "valkey.log") as valkey:
        processes = Processes(tmp_path, valkey)
        worker, said = await processes.start("worker", SEGUE_ROLES="decode", SEGUE_DECODE_TP="2", SEGUE_THREADS="1")
        await said.of(worker)
        (rank,) = descendants(worker.pid)
        os.kill(rank, signal.SIGKILL)
        assert await asyncio.shield(worker.exited) == 1
        assert '"code": "worker_lost"' in worker.log.read_text()
