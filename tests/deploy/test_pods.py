"""The image, built; and of it the chart's pods, run for real but for the containers: they find each other, answer, and are
replaced under load. All in one file, so that the image is built once, beside the other tests (make test-deploy)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.charts import Object, pick, pod_templates, render
from tests.deploy.image import Root
from tests.deploy.pods import Node, Pod, requests_of
from tests.deploy.policies import may_connect
from tests.support.namespaces import what_is_missing
from tests.support.tiny_model import make_tiny_model

pytestmark = [
    pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing()),
    pytest.mark.timeout(900),
]

SETS = (
    'model={"download": false, "name": "/models/tiny", "storage": {"existingClaim": "models"}}',
    # Small, quantized, which needs the init container, and with two ranks on one side.
    'engine={"quantization": "int8", "kv_memory": "4MiB", "threads": 1, "decode_tp": 2}',
    "router.preStopSeconds=1",
)
START_LIMIT_S = 120.0
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


class Cluster:
    def __init__(self, node: Node, objects: list[Object]) -> None:
        self.node = node
        self.objects = objects
        self.pods: dict[str, Pod] = {}

    def start(self, component: str, number: int = 0) -> Pod:
        kind = "Deployment" if component == "router" else "StatefulSet"
        (template,) = pod_templates(pick(self.objects, kind, f"-{component}"))
        name = f"segue-{component}-{number}"
        self.pods[name] = self.node.start(template, name)
        return self.pods[name]

    def until_probes_pass(self, *pods: Pod) -> None:
        """What readiness probes ask, of workers at their health port, of routers at /ready."""
        limit_s = time.monotonic() + START_LIMIT_S
        for pod in pods:
            while (problem := self._problem(pod)) != "":
                assert time.monotonic() < limit_s, f"{pod.name}: {problem}\n{pod.log.read_text()[-4000:]}"
                time.sleep(0.3)

    def _problem(self, pod: Pod) -> str:
        if "router" in pod.name:
            code = f"import urllib.request as r; print(r.urlopen('http://{pod.address}:8000/ready', timeout=6).status)"
            done = pod.command("python", "-c", code, env={})
        else:
            env = {"SEGUE_ROLES": "x", "SEGUE_HOST": pod.address, "SEGUE_HEALTH_PORT": "50062"}
            done = pod.command("python", "-m", "deploy.health", env=env)
        return done.stderr if done.returncode else ""


@pytest.fixture(scope="module")
def cluster(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A router, and two workers of each kind."""
    claim = tmp_path_factory.mktemp("claim")
    for file in make_tiny_model(claim / "tiny").iterdir():
        file.chmod(0o644)
    for folder in (claim, claim / "tiny"):
        folder.chmod(0o755)
    objects = render(*(word for one in SETS for word in ("--set-json", one)))
    with Node(tmp_path_factory.mktemp("node"), image, objects, {"models": claim}) as node:
        cluster = Cluster(node, objects)
        node.name_service("segue-valkey", cluster.start("valkey").address)
        workers = [cluster.start(role, number) for role in ("prefill", "decode") for number in range(2)]
        router = cluster.start("router")
        cluster.until_probes_pass(*workers, router)
        yield cluster


def test_workers_are_replaced_one_by_one_and_no_request_fails(cluster: Cluster) -> None:
    router = cluster.pods["segue-router-0"]
    with requests_of(cluster.node, router.address, "tiny") as outcome:
        for name in ("prefill-0", "decode-0"):
            role, _, number = name.partition("-")
            cluster.pods[f"segue-{name}"].terminate()
            cluster.until_probes_pass(cluster.start(role, int(number)))
            # minReadySeconds: routers find it meanwhile.
            time.sleep(2)
    assert outcome["answered"] > 20
    assert outcome["failed"] == 0


def test_policies_allow_every_connection_that_there_is(cluster: Cluster) -> None:
    by_address = {pod.address: pod for pod in cluster.pods.values()}
    router = cluster.pods["segue-router-0"]
    with requests_of(cluster.node, router.address, "tiny"):
        time.sleep(2)
        found = [(by_address.get(source), pod, port) for pod in by_address.values() for source, port in pod.served()]
    kinds = {
        (source.name.split("-")[1] if source else "client", target.name.split("-")[1], port) for source, target, port in found
    }
    # Else there was nothing to see.
    assert {("router", "prefill", 50061), ("router", "decode", 50061), ("prefill", "valkey", 6379)} <= kinds
    assert ("prefill", "decode", 50071) in kinds
    for source, target, port in found:
        if source is not None:
            assert may_connect(cluster.objects, source.labels, target.labels, port), (source.name, target.name, port)


def test_all_end_in_time_when_they_are_told_to(cluster: Cluster) -> None:
    """Nothing runs, so that nothing has to be waited for."""
    for name in ("router-0", "decode-0", "prefill-0", "valkey-0"):
        assert cluster.pods[f"segue-{name}"].terminate() < 10
