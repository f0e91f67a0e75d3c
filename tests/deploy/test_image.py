"""The container image, and the compose file that runs it on one host."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from segue.config import RouterSettings, WorkerSettings
from tests.deploy.charts import BIN, ROOT
from tests.deploy.image import DOCKERFILE, Root, context_files, stages
from tests.support.tiny_model import make_tiny_model

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


# A worker with two ranks and a router: a request, the health command, the end by SIGTERM.
SERVE = """
touch /tmp/writable /models/writable
if touch /opt/segue/x 2>/dev/null || touch /x 2>/dev/null; then echo "the root can be written"; exit 1; fi
segue --version
valkey=$(python -c 'from deploy.valkey import server_binary; print(server_binary())')
$valkey --port 7379 --save "" --dir /tmp > /tmp/valkey.log &
export SEGUE_REDIS=redis://127.0.0.1:7379 SEGUE_CLUSTER_ID=c SEGUE_MODEL=/var/tiny SEGUE_KV_MEMORY=2MiB SEGUE_THREADS=1
(export SEGUE_ROLES=prefill,decode SEGUE_PREFILL_TP=2 SEGUE_HEALTH_PORT=7062; exec segue worker) > /tmp/worker.log 2>&1 &
worker=$!
(export SEGUE_HTTP_PORT=7000 SEGUE_GRPC_PORT=7051; exec segue router) > /tmp/router.log 2>&1 &
router=$!
python - <<'P'
import asyncio
from deploy.probe import until_ready
try:
    asyncio.run(asyncio.wait_for(until_ready("127.0.0.1:7000"), 90))
except TimeoutError:
    print(open("/tmp/worker.log").read(), open("/tmp/router.log").read())
    raise
P
SEGUE_ROLES=decode SEGUE_HEALTH_PORT=7062 python -m deploy.health
SEGUE_HTTP_PORT=7000 python -m deploy.health
kill $router; wait $router
kill $worker; wait $worker
echo served
"""


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
@pytest.mark.timeout(900)
def test_its_build_runs_in_a_clean_root_and_serves_on_a_read_only_one(image: Path, tmp_path: Path) -> None:
    site = next((image / "opt/segue/lib").glob("python3*")) / "site-packages"
    assert list((site / "engine/kernels").glob("_native*.so"))
    assert not (site / "tests").exists()
    assert not (image / "root/.cache").exists()
    root = Root(tmp_path)
    for file in make_tiny_model(root.changes / "var/tiny").iterdir():
        file.chmod(0o644)
    said = root.as_in_kubernetes(image, SERVE, {})
    assert "segue 0." in said
    assert said.endswith("served\n")


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
