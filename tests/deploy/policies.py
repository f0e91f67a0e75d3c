"""What the chart promises of its pods, looked at in rendered objects."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.deploy.charts import Object, containers, pod_templates

# What volumes the Pod Security Standard *restricted* lets a pod have.
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_HOST = ("hostNetwork", "hostPID", "hostIPC")


def restricted_errors(one: Object) -> list[str]:
    """Of the Pod Security Standard *restricted*, and of two rules more: read-only root, and no token of the API server."""
    return [f"{one['kind']} {one['metadata']['name']}: {error}" for pod in pod_templates(one) for error in _pod_errors(pod)]


def _pod_errors(pod: Object) -> Iterable[str]:
    spec = pod["spec"]
    security = spec.get("securityContext", {})
    yield from (f"{name} is set" for name in _HOST if spec.get(name))
    yield from (
        f"volume {volume['name']} is of a kind that is not allowed"
        for volume in spec.get("volumes", [])
        if not _VOLUMES.intersection(volume)
    )
    if spec.get("automountServiceAccountToken") is not False:
        yield "the token of its service account is mounted"
    for container in containers(pod):
        yield from (f"{container['name']}: {error}" for error in _container_errors(container, security))


def _container_errors(container: Object, pod_security: Object) -> Iterable[str]:
    own = container.get("securityContext", {})
    both = pod_security | own
    if both.get("runAsNonRoot") is not True or both.get("runAsUser") == 0:
        yield "may run as root"
    if both.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
        yield "has no seccomp profile"
    if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
        yield "may gain privileges"
    if own.get("capabilities", {}).get("drop") != ["ALL"] or set(own["capabilities"].get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "keeps capabilities"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "may write to its image"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "takes a port of the host"
    resources = container.get("resources", {})
    yield from (
        f"has no {part} of {name}"
        for part in ("requests", "limits")
        for name in ("cpu", "memory")
        if name not in resources.get(part, {})
    )


def may_connect(objects: list[Object], source: Object, target: Object, port: int | str) -> bool:
    """Whether the network policies among `objects` let a pod with the labels `source` open TCP `port` of one with the labels
    `target`, both of them in the namespace of the policies. Ports by name must be asked for by name."""
    policies = [one["spec"] for one in objects if one["kind"] == "NetworkPolicy"]
    return _passes(policies, "Egress", source, target, port) and _passes(policies, "Ingress", target, source, port)


def _passes(policies: list[Object], direction: str, pod: Object, peer: Object, port: int | str) -> bool:
    own = [one for one in policies if direction in one["policyTypes"] and _selects(one["podSelector"], pod)]
    side = "to" if direction == "Egress" else "from"
    rules = [rule for one in own for rule in one.get(direction.lower(), [])]
    return not own or any(_rule_matches(rule, side, peer, port) for rule in rules)


def _rule_matches(rule: Object, side: str, peer: Object, port: int | str) -> bool:
    ports, peers = rule.get("ports", []), rule.get(side, [])
    return (not ports or any(_has_port(entry, port) for entry in ports)) and (
        not peers or any("namespaceSelector" not in entry and _selects(entry["podSelector"], peer) for entry in peers)
    )


def _has_port(entry: Object, port: int | str) -> bool:
    if entry.get("protocol", "TCP") != "TCP":
        return False
    if isinstance(port, str) or isinstance(entry["port"], str):
        return bool(entry["port"] == port)
    return bool(entry["port"] <= port <= entry.get("endPort", entry["port"]))


def _selects(selector: Object, labels: dict[str, Any]) -> bool:
    wanted = selector.get("matchLabels", {})
    rules = selector.get("matchExpressions", [])
    assert all(rule["operator"] == "In" for rule in rules)
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        labels.get(rule["key"]) in rule["values"] for rule in rules
    )
