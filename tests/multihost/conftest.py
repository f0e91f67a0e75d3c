"""A Ray cluster over hosts of its own, Segue on it, and clients on a further host."""

from __future__ import annotations

import asyncio
import json
import random
import secrets
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deploy.valkey import Valkey, server_binary
from tests.multihost.hosts import Host, Program
from tests.multihost.load import Ending
from tests.support.cluster import in_process_cluster
from tests.support.namespaces import what_is_missing
from tests.support.network import Network
from tests.support.tiny_model import make_tiny_model

if missing := what_is_missing():
    raise RuntimeError(missing)

NUM_TOKENS = 48
_RAY = str(Path(sys.executable).with_name("ray"))
_SEGUE = str(Path(sys.executable).with_name("segue"))
_RAY_PORT, _REDIS_PORT, _GRPC_PORT = 6379, 6380, 50051
# A host that says nothing for about ten seconds is taken to be gone; Ray's own limits are longer.
_HEALTH_CHECK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "8",
}
# One worker each; there is one decode host more than there are decode workers.
WORKER_HOSTS = {"prefill-a": "prefill_node", "prefill-b": "prefill_node"} | {
    f"decode-{letter}": "decode_node" for letter in "abc"
}


@dataclass
class Load:
    """Clients that ask without end; what their requests came to."""

    program: Program

    @property
    def endings(self) -> list[Ending]:
        return [Ending(**json.loads(line)) for line in self.program.lines]

    async def some_more(self, number: int = 20) -> list[Ending]:
        """The next `number` requests that end."""
        begin = len(self.program.lines)
        await self.program.line_with("", after=begin + number - 1)
        return self.endings[begin:]


@dataclass
class MultiHost:
    hosts: dict[str, Host]
    folder: Path
    model: Path
    # Prompts and their answers, for the clients.
    expected: Path
    env: dict[str, str]
    # Ray on each host.
    ray: dict[str, Program] = field(default_factory=dict)
    programs: list[Program] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.hosts['head'].address}:{_GRPC_PORT}"

    async def run(self, host: str, *command: str, env: dict[str, str] | None = None, stdin: bytes | None = None) -> Program:
        log = self.folder / f"{host}-{Path(command[0]).name}.log"
        self.programs.append(await self.hosts[host].start(*command, env=self.env | (env or {}), stdin=stdin, log=log))
        return self.programs[-1]

    async def until_all_ended(self) -> None:
        """For when all hosts are off: also those that nobody waited for are buried."""
        await asyncio.gather(*(program.ended() for program in self.programs))

    async def segue(self, *words: str, status: int = 0) -> str:
        """What a command on the clients' host prints, which has to end with this status."""
        program = await self.run("client", _SEGUE, *words, env={"SEGUE_ADDRESS": self.address})
        assert await program.ended() == status, "\n".join(program.lines)
        return "\n".join(program.lines)

    async def workers(self) -> dict[str, dict[str, Any]]:
        """By worker id, as `segue status` tells of them."""
        status = json.loads(await self.segue("status", "--json"))
        return {worker["worker_id"]: worker for worker in status["workers"]}

    async def until(self, worker_id: str, **wanted: object) -> dict[str, Any]:
        """The worker's status once it has these values; `epoch_above` and `decoded_above` compare."""
        while True:
            worker = (await self.workers()).get(worker_id)
            if worker is not None and _fits(worker, dict(wanted)):
                return worker

    async def until_away(self, worker_id: str) -> None:
        """Until the router gives it nothing, and perhaps has forgotten it."""
        while (worker := (await self.workers()).get(worker_id)) is not None and worker["state"] == "ready":
            pass

    def host_of(self, worker: dict[str, Any]) -> str:
        return next(name for name, host in self.hosts.items() if worker["address"].startswith(f"{host.address}:"))

    async def boot(self, name: str) -> None:
        self.hosts[name].boot()
        if name != "client":
            await self.start_ray(name)

    async def start_ray(self, name: str) -> None:
        address = self.hosts[name].address
        words = ["start", "--block", "--node-ip-address", address, "--object-store-memory", str(80 * 2**20)]
        words += ["--disable-usage-stats"]
        if name == "head":
            words += [
                "--head",
                "--port",
                str(_RAY_PORT),
                "--num-cpus",
                "0",
                "--include-dashboard=false",
                "--temp-dir",
                "/mnt/ray",
            ]
        else:
            words += ["--address", f"{self.hosts['head'].address}:{_RAY_PORT}", "--num-cpus", "1"]
            words += ["--resources", json.dumps({WORKER_HOSTS[name]: 1})]
        ray = self.ray[name] = await self.run(name, _RAY, *words, env=_HEALTH_CHECK)
        await ray.line_with("runtime started")

    @asynccontextmanager
    async def load(self) -> AsyncIterator[Load]:
        """As long as the block. Then not one request may have failed."""
        words = (sys.executable, "-m", "tests.multihost.load", self.address, str(self.expected))
        program = await self.run("client", *words)
        load = Load(program)
        try:
            await load.some_more()
            yield load
            await load.some_more()
        finally:
            assert program.process.stdin is not None
            program.process.stdin.close()
            assert await program.ended() == 0, "\n".join(program.lines[-20:])
        assert [ending.error for ending in load.endings if ending.error] == []


def _fits(worker: dict[str, Any], wanted: dict[str, Any]) -> bool:
    above = {"epoch_above": worker["epoch"], "decoded_above": worker["load"]["decoded_tokens"]}
    return all(above[name] > value if name in above else worker[name] == value for name, value in wanted.items())


@pytest.fixture(scope="session")
async def expected(valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model, and a file of prompts with the answers of a cluster in one process."""
    folder = tmp_path_factory.mktemp("expected")
    model = make_tiny_model(folder / "tiny")
    chance = random.Random(7)
    prompts = [[chance.randrange(3, 259) for _ in range(chance.randrange(20, 200))] for _ in range(40)]
    async with in_process_cluster(valkey.url, model, colocated=True) as cluster:
        answers = await asyncio.gather(
            *(cluster.client.generate(prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True) for prompt in prompts)
        )
    file = folder / "expected.json"
    file.write_text(json.dumps([(prompt, answer.token_ids) for prompt, answer in zip(prompts, answers, strict=True)]))
    return model, file


@pytest.fixture(scope="session")
async def multihost(expected: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[MultiHost]:
    folder = tmp_path_factory.mktemp("multihost")
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "SEGUE_HOME": str(folder / "home")}
    env |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    model, file = expected
    async with AsyncExitStack() as exits:
        network = exits.enter_context(Network())
        hosts = {name: Host(network, name) for name in ("head", "client", *WORKER_HOSTS)}
        multihost = MultiHost(hosts, folder, model, file, env)
        exits.push_async_callback(multihost.until_all_ended)
        for host in hosts.values():
            exits.callback(host.power_off)
        await multihost.boot("head")
        await asyncio.gather(*(multihost.boot(name) for name in ("client", *WORKER_HOSTS)))
        password = secrets.token_hex(16)
        head = hosts["head"].address
        config = f"bind {head}\nport {_REDIS_PORT}\nrequirepass {password}\nsave ''\n"
        redis = await multihost.run("head", str(server_binary()), "-", stdin=config.encode())
        await redis.line_with("Ready to accept connections")
        flags = {
            "model": model,
            "ray-address": f"{head}:{_RAY_PORT}",
            "redis": f"redis://:{password}@{head}:{_REDIS_PORT}",
            "prefill": 2,
            "decode": 2,
            "prefill-resources": "prefill_node=1",
            "decode-resources": "decode_node=1",
            "host": head,
            "grpc-port": _GRPC_PORT,
            "threads": 1,
            "kv-memory": "4MiB",
            "block-size": 4,
            "disaggregate": "always",
            # So that every worker always has something to lose.
            "policy": "round_robin",
        }
        up = await multihost.run("head", _SEGUE, "up", *(f"--{name}={value}" for name, value in flags.items()))
        await up.line_with("^serving ")
        yield multihost
        up.signal(signal.SIGINT)
        assert await up.ended() == 0, "\n".join(up.lines[-20:])
