"""Each check says what it found, and what to do when that is not good."""

from __future__ import annotations

import importlib.metadata
import socket
import sys
from pathlib import Path

import pytest

from deploy import doctor
from deploy.doctor import Finding, examine
from deploy.launch import Programs
from deploy.router_process import RouterProcess
from engine.kernels import native
from segue.config import ClusterSettings, RouterSettings


def unused_ports() -> ClusterSettings:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return ClusterSettings(http_port=one.getsockname()[1], grpc_port=other.getsockname()[1])


async def test_a_fit_machine_without_a_cluster(segue_home: Path) -> None:
    shown: list[Finding] = []
    findings = await examine(unused_ports(), shown.append)
    assert shown == findings
    by_check = {finding.check: finding for finding in findings}
    expected = ["python", "packages", "cores", "memory", "shm", "torch", "kernels", "ray", "models", "valkey", "ports"]
    assert list(by_check) == expected
    for check in ("python", "packages", "kernels", "ray", "valkey", "ports"):
        assert by_check[check].verdict == "ok", by_check[check]
    assert by_check["models"].verdict == "warn"
    assert "segue models pull" in by_check["models"].advice
    assert all(finding.advice for finding in findings if finding.verdict != "ok")


def test_a_missing_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "ray":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    (finding,) = doctor.check_packages(ClusterSettings())
    assert (finding.verdict, finding.detail) == ("fail", "not installed: ray")
    assert "pip install" in finding.advice


def test_a_package_that_cannot_be_loaded_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (finding,) = doctor.check_ray(ClusterSettings())
    assert finding.verdict == "fail"


def test_kernels_that_were_not_built_are_a_warning_and_damaged_ones_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "built_library", lambda: None)
    (finding,) = doctor.check_kernels(ClusterSettings())
    assert finding.verdict == "warn"
    assert "compiler" in finding.advice
    (tmp_path / "native.so").write_bytes(b"no library")
    monkeypatch.setattr(native, "built_library", lambda: native.open_library(str(tmp_path / "native.so")))
    (finding,) = doctor.check_kernels(ClusterSettings())
    assert finding.verdict == "fail"
    assert "native.so" in finding.detail


def test_too_little_memory_is_a_warning() -> None:
    memory = {finding.check: finding for finding in doctor.check_machine(ClusterSettings(kv_memory=2**60))}["memory"]
    assert memory.verdict == "warn"
    assert "--kv-memory" in memory.advice


def test_every_rank_needs_memory() -> None:
    settings = ClusterSettings(prefill=2, prefill_tp=2, decode_tp=4)
    memory = {finding.check: finding for finding in doctor.check_machine(settings)}["memory"]
    assert "8 worker processes" in memory.detail


def test_available_memory_is_read_from_meminfo() -> None:
    assert doctor.available_bytes("MemTotal: 9 kB\nMemAvailable:    2048 kB\n") == 2 * 2**20
    assert doctor.available_bytes("") == 0


def test_a_store_that_cannot_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEGUE_HOME", str(tmp_path / "file"))
    (finding,) = doctor.check_store(ClusterSettings())
    assert finding.verdict == "fail"
    assert "SEGUE_HOME" in finding.advice


async def test_a_port_that_another_program_has_is_a_warning() -> None:
    settings = unused_ports()
    with socket.create_server(("127.0.0.1", settings.grpc_port)):
        findings = [finding async for finding in doctor.check_cluster(settings)]
    assert [finding.verdict for finding in findings] == ["ok", "warn"]
    assert "--grpc-port" in findings[1].advice


async def test_a_cluster_that_runs_is_asked_how_it_is(stub_programs: Programs, tmp_path: Path) -> None:
    settings = RouterSettings(cluster_id="c", redis="r", model_dir=tmp_path, model_name="m", http_port=0)
    router = await RouterProcess.start(settings, tmp_path / "log", stub_programs.router)
    try:
        await router.serving()
        port = int(router.http.rpartition(":")[2])
        asked = unused_ports().model_copy(update={"http_port": port})
        findings = [finding async for finding in doctor.check_cluster(asked)]
    finally:
        await router.stop()
    assert [(finding.check, finding.verdict) for finding in findings] == [
        ("cluster", "ok"),
        ("workers", "fail"),  # the stand-in has no gRPC
        ("canary", "ok"),
    ]
