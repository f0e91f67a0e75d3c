"""Renders the chart with a real Helm."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/segue"
BIN = Path(sys.prefix) / "deploy-tools/bin"
RAY = ("--api-versions", "ray.io/v1")

Object = dict[str, Any]


class Refused(Exception):
    """What Helm says is wrong with the values."""


@dataclass(frozen=True, slots=True)
class Case:
    """Options of helm template; `values` are names of files in the chart."""

    name: str
    values: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    more: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        files = [word for name in self.values for word in ("-f", str(CHART / name))]
        return (*files, *(word for pair in self.sets for word in ("--set-json", pair)), *self.more)


CASES = (
    Case("default"),
    Case("cpu", ("values-cpu.yaml",)),
    Case("gpu", ("values-gpu.yaml",)),
    Case("ha-cpu", ("values-cpu.yaml", "values-ha.yaml")),
    Case("ha-gpu", ("values-gpu.yaml", "values-ha.yaml")),
    Case("ray", sets=('workers.mode="ray"',), more=RAY),
    Case("ray-gpu", ("values-gpu.yaml",), ('workers.mode="ray"', "prefill.replicas=3"), RAY),
    Case("ranks", sets=("engine.prefill_tp=2", "engine.decode_tp=4", "engine.kv_memory=8589934592")),
    Case(
        "hpa",
        sets=(
            'prefill.autoscaling={"enabled": true, "kind": "hpa"}',
            'decode.autoscaling={"enabled": true, "kind": "hpa"}',
            "router.autoscaling.enabled=true",
        ),
    ),
    Case(
        "gateway",
        sets=(
            'gateway={"http": true, "grpc": true, "parentRefs": [{"name": "web", "namespace": "w"}], "hostnames": ["a.b"]}',
            'tls={"existingSecret": "tls", "clientAuth": true}',
            'apiKeys.existingSecret="keys"',
            'monitoring.serviceMonitor={"enabled": true, "apiKey": {"existingSecret": "metrics"}}',
        ),
    ),
    Case(
        "volume",
        sets=(
            'model={"download": false, "name": "/models/mine", "servedName": "mine", "storage": {"existingClaim": "models"}}',
            'engine={"quantization": "int4", "keep_float": ["head", "down"], "kv_pull": false}',
            'decode.settings={"kv_memory": "2GiB", "ticket_lease_ms": 25500}',
        ),
    ),
    Case(
        "restricted-network",
        sets=(
            'networkPolicy={"clients": [{"namespaceSelector": {"matchLabels": {"team": "web"}}}], '
            '"extraEgress": [{"ports": [{"port": 4317}]}]}',
            'podLabels={"team": "ml"}',
            'podAnnotations={"a": "b"}',
            'imagePullSecrets=[{"name": "pull"}]',
            'serviceAccount={"create": false, "name": "own"}',
        ),
    ),
    Case(
        "bare",
        sets=(
            "networkPolicy.enabled=false",
            "valkey.persistence.enabled=false",
            "router.disruptionBudget.enabled=false",
            "prefill.disruptionBudget.enabled=false",
            'router.service={"type": "LoadBalancer", "annotations": {"a": "b"}}',
            'model.hubToken.existingSecret="hub"',
            'fullnameOverride="other"',
        ),
    ),
)


def helm(*words: str) -> str:
    """Its output. Raises Refused."""
    done = subprocess.run([BIN / "helm", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(done.stdout + done.stderr)
    return done.stdout


@cache
def render_text(*words: str) -> str:
    return helm("template", "segue", str(CHART), "--namespace", "models", *words)


def render(*words: str) -> list[Object]:
    """A new copy each time. Raises Refused."""
    return [document for document in yaml.load_all(render_text(*words), Loader=yaml.CSafeLoader) if document]


def pick(objects: list[Object], kind: str, name: str) -> Object:
    """The only one of this kind whose name ends so."""
    (found,) = [one for one in objects if one["kind"] == kind and one["metadata"]["name"].endswith(name)]
    return found


def pod_templates(one: Object) -> list[Object]:
    """Of whatever makes pods, or of a pod itself."""
    spec = one.get("spec", {})
    match one["kind"]:
        case "Pod":
            return [one]
        case "RayCluster":
            return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    return [spec["template"]] if "template" in spec else []


def containers(pod: Object) -> list[Object]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def main_container(one: Object) -> Object:
    """The first of the only pod that `one` makes."""
    (pod,) = pod_templates(one)
    container: Object = pod["spec"]["containers"][0]
    return container
