"""Whether objects are what an API server would take: unknown fields are errors too.

Kubernetes' own kinds by the strict schemas of kubernetes-validate, those of KEDA and the Prometheus operator by cloudcoil's
models. No package has those of KubeRay and the Gateway API: of KubeRay the CRDs themselves are taken where KUBERAY_CRDS names a
folder with them (ray-operator's config/crd/bases); else, and for the Gateway API, what is written here of the fields that the
chart uses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from cloudcoil.models.keda import v1alpha1 as keda
from cloudcoil.models.prometheus_operator import v1 as prometheus
from jsonschema import Draft7Validator, Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from tests.deploy.charts import Object, pod_templates

MINORS = ("1.35", "1.36", "1.37")
_FOLDER = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
_MODELS = {
    ("keda.sh/v1alpha1", "ScaledObject"): keda.ScaledObject,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): prometheus.ServiceMonitor,
    ("monitoring.coreos.com/v1", "PrometheusRule"): prometheus.PrometheusRule,
}


def schema_errors(one: Object, minor: str) -> list[str]:
    """Each with its place."""
    kind = (one["apiVersion"], one["kind"])
    errors = list(_validator(*kind, minor).iter_errors(one))
    if kind[0].startswith("ray.io/"):
        for template in pod_templates(one):
            errors += _kubernetes(minor, "podtemplatespec-v1").iter_errors(template)
    return [f"{one['kind']} {'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in errors]


@cache
def _validator(api_version: str, kind: str, minor: str) -> Any:
    if (model := _MODELS.get((api_version, kind))) is not None:
        return Draft202012Validator(_strict(model.model_json_schema(by_alias=True)))
    if api_version.startswith("gateway.networking.k8s.io/"):
        return Draft202012Validator(_ROUTES[kind])
    if api_version.startswith("ray.io/"):
        return Draft202012Validator(_ray_schema(api_version, kind))
    group, _, version = api_version.rpartition("/")
    short = f"-{group.split('.')[0]}" if group else ""
    return _kubernetes(minor, f"{kind.lower()}{short}-{version}")


@cache
def _kubernetes(minor: str, name: str) -> Any:
    folder = _FOLDER / f"v{minor}.0-local-strict"

    def retrieve(uri: str) -> Resource[Any]:
        return Resource.from_contents(json.loads((folder / Path(uri).name).read_text()), DRAFT7)

    registry: Registry[Any] = Registry(retrieve=cache(retrieve))  # type: ignore[call-arg]
    return Draft7Validator(json.loads((folder / f"{name}.json").read_text()), registry=registry)


def _ray_schema(api_version: str, kind: str) -> Any:
    if not (folder := os.environ.get("KUBERAY_CRDS")):
        return _RAY[kind]
    for file in sorted(Path(folder).glob("*.yaml")):
        crd = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)
        for version in crd["spec"]["versions"]:
            if (crd["spec"]["names"]["kind"], f"{crd['spec']['group']}/{version['name']}") == (kind, api_version):
                schema = _strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                return schema
    raise LookupError(f"{folder} has no CRD of {kind} {api_version}")


def _strict(schema: Any) -> Any:
    """Refuses fields that are not described; int-or-string and nullable as Kubernetes means them."""
    if isinstance(schema, list):
        return [_strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    if schema.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    keeps_unknown = schema.pop("x-kubernetes-preserve-unknown-fields", False)
    if schema.pop("nullable", False) and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    schema.pop("format", None)
    for name in ("properties", "$defs"):
        if name in schema:
            schema[name] = {key: _strict(value) for key, value in schema[name].items()}
    for name in ("items", "anyOf", "oneOf", "allOf"):
        if name in schema:
            schema[name] = _strict(schema[name])
    if isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = _strict(schema["additionalProperties"])
    elif schema.get("properties") and not keeps_unknown:
        schema.setdefault("additionalProperties", False)
    return schema


_TEXT, _TEXTS = {"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}
_PORT = {"type": "integer", "minimum": 1, "maximum": 65535}


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required.split(), "properties": properties}


def _kind(name: str, spec: Any) -> dict[str, Any]:
    metadata = _object("name", name=_TEXT, namespace=_TEXT, labels=_TEXTS, annotations=_TEXTS)
    return _object("apiVersion kind metadata spec", apiVersion=_TEXT, kind={"const": name}, metadata=metadata, spec=spec)


def _list(item: Any) -> dict[str, Any]:
    return {"type": "array", "items": item}


def _route(name: str, **rule: Any) -> dict[str, Any]:
    parent = _object("name", group=_TEXT, kind=_TEXT, name=_TEXT, namespace=_TEXT, sectionName=_TEXT, port=_PORT)
    backend = _object("name port", group=_TEXT, kind=_TEXT, name=_TEXT, namespace=_TEXT, port=_PORT, weight={"type": "integer"})
    rules = _list(_object("backendRefs", backendRefs=_list(backend), **rule))
    return _kind(name, _object("parentRefs rules", parentRefs=_list(parent), hostnames=_list(_TEXT), rules=rules))


_DURATION = {"type": "string", "pattern": r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
_PATH = _object(
    "type value", type={"enum": ["Exact", "PathPrefix", "RegularExpression"]}, value={"type": "string", "pattern": "^/"}
)
_ROUTES = {
    "HTTPRoute": _route(
        "HTTPRoute", matches=_list(_object(path=_PATH)), timeouts=_object(request=_DURATION, backendRequest=_DURATION)
    ),
    "GRPCRoute": _route("GRPCRoute"),
}
_COUNT = {"type": "integer", "minimum": 0}
_RAY = {
    "RayCluster": _kind(
        "RayCluster",
        _object(
            "headGroupSpec",
            rayVersion=_TEXT,
            headGroupSpec=_object("template", rayStartParams=_TEXTS, serviceType=_TEXT, template={"type": "object"}),
            workerGroupSpecs=_list(
                _object(
                    "groupName minReplicas maxReplicas template",
                    groupName=_TEXT,
                    replicas=_COUNT,
                    minReplicas=_COUNT,
                    maxReplicas=_COUNT,
                    rayStartParams=_TEXTS,
                    template={"type": "object"},
                )
            ),
        ),
    )
}


def on_all_minors(objects: list[Object]) -> Iterator[str]:
    for minor in MINORS:
        for one in objects:
            yield from (f"Kubernetes {minor}: {error}" for error in schema_errors(one, minor))
