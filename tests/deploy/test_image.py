"""The container image, and the compose file that runs it on one host."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from segue.config import RouterSettings, WorkerSettings
from tests.deploy.charts import BIN, ROOT
from tests.deploy.image import DOCKERFILE, context_files, stages

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "deploy/docker/compose.yaml").read_text())


def hadolint(text: str) -> set[str]:
    """Numbers of the rules that a Dockerfile breaks."""
    done = subprocess.run([BIN / "hadolint", "-f", "json", "-"], input=text, capture_output=True, text=True, check=False)
    return {found["code"] for found in json.loads(done.stdout)}


def test_hadolint_finds_nothing_and_would_find_a_mistake() -> None:
    assert hadolint(DOCKERFILE.read_text()) == set()
    assert "DL3002" in hadolint(DOCKERFILE.read_text().replace("USER 10001:10001", "USER root"))


def test_it_runs_without_root_or_compiler() -> None:
    final = stages()[-1]
    assert ("USER", "10001:10001") in final.steps
    assert [stage.name for stage in stages()] == ["build", "runtime-cpu", "runtime-cuda", ""]
    assert final.base == "runtime-${VARIANT}"
    (cpu,) = [stage for stage in stages() if stage.name == "runtime-cpu"]
    assert not [text for _, text in cpu.steps if "gcc" in text or "g++" in text]
    assert any(instruction == "HEALTHCHECK" and "deploy.health" in text for instruction, text in final.steps)


def test_the_build_sees_only_what_it_needs() -> None:
    files = context_files()
    assert {file.split("/")[0] for file in files} == {
        *("pyproject.toml", "README.md", "constraints.txt"),
        *("segue", "engine", "kv_transfer", "prefill_worker", "decode_worker", "router", "deploy", "bench"),
    }
    assert not [file for file in files if file.startswith(("deploy/helm", "deploy/kubernetes", "deploy/docker"))]


SERVICES = {name: service for name, service in COMPOSE["services"].items() if name != "valkey"}


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_compose_gives_no_more_than_is_needed(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service["user"].startswith("0")
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize(
    ("name", "kind"), [("router", RouterSettings), ("prefill", WorkerSettings), ("decode", WorkerSettings)]
)
def test_compose_gives_settings_that_processes_take(name: str, kind: Any) -> None:
    env = {name: default_of(str(value)) for name, value in SERVICES[name]["environment"].items()}
    settings = kind.load(
        flags={"model_dir": Path("/m"), "model_name": "m", **({"worker_id": "w"} if name != "router" else {})}, env=env
    )
    assert settings.cluster_id == "compose"
    assert settings.redis.startswith("redis://:")
    # The longest drain, and a lease.
    grace_s = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
    assert grace_s >= settings.drain_s + getattr(settings, "ticket_lease_ms", 0) / 1000 + 5


def default_of(text: str) -> str:
    """Compose's ${NAME:-default}."""
    head, found, rest = text.partition("${")
    return head + rest.partition(":-")[2].replace("}", "", 1) if found else text
