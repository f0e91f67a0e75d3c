"""`python -m deploy.chart_schema`: writes the settings of Segue's processes into the Helm chart's values.schema.json.

The rest of that file is written by hand. So a chart's values have the settings' own names, and a wrong one is refused by Helm.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from segue.config import (
    EngineSettings,
    ObservabilitySettings,
    RouterSettings,
    Settings,
    WorkerSettings,
    parse_bytes,
    parse_names,
)

SCHEMA = Path(__file__).parent / "helm/segue/values.schema.json"
# What the chart sets by itself, from other values.
_OF_CLUSTER = ("cluster_id", "redis", "cluster_secret", "host", "http_port", "grpc_port", "model", "model_dir", "model_name")
_OF_ALL = (*_OF_CLUSTER, *ObservabilitySettings.model_fields)
_OF_ROUTER = (*_OF_ALL, "router_id", "shares_ports", "drain_s", "api_keys_file", "tls_cert", "tls_key", "tls_client_ca")
_OF_WORKER = (*_OF_ALL, "drain_s", "kv_port", "health_port", "worker_id", "roles", "rank", "group")
# A pool cannot differ in these from what its pods' volumes and network policies are made for.
_OF_ENGINE = ("device", "prefill_tp", "decode_tp", "kv_transport")


def settings_schemas() -> dict[str, Any]:
    """By name in `$defs`, the settings that each part of the chart's values takes."""
    return {
        "engineSettings": _schema(EngineSettings, ()),
        "observabilitySettings": _schema(ObservabilitySettings, ()),
        "routerSettings": _schema(RouterSettings, _OF_ROUTER),
        "workerSettings": _schema(WorkerSettings, (*_OF_WORKER, *_OF_ENGINE)),
    }


def with_settings(schema: str) -> str:
    """The text of values.schema.json, its settings brought up to date."""
    whole = json.loads(schema)
    whole["$defs"] |= settings_schemas()
    return json.dumps(whole, indent=2) + "\n"


def _schema(settings: type[Settings], without: Iterable[str]) -> dict[str, Any]:
    known = settings.model_json_schema()["properties"]
    names = [name for name in known if name not in set(without)]
    properties = {name: _property(settings, name, known[name]) for name in names}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _property(settings: type[Settings], name: str, known: dict[str, Any]) -> dict[str, Any]:
    """Without the defaults: those of the chart are in its values.yaml."""
    if "anyOf" in known:
        (inner,) = [option for option in known["anyOf"] if option != {"type": "null"}]
        known = {**known, **inner}
    readers = [getattr(part, "func", None) for part in settings.model_fields[name].metadata]
    kept = {key: value for key, value in known.items() if key not in {"title", "default", "anyOf"}}
    if parse_bytes in readers:
        number = {key: kept.pop(key) for key in ("type", "minimum") if key in kept}
        return kept | {"anyOf": [number, {"type": "string", "pattern": r"^\d+(\.\d+)?\s*([kKmMgGtT]?)([iI]?[bB])?$"}]}
    if parse_names in readers:
        return {key: value for key, value in kept.items() if key in {"type", "items", "description"}}
    return kept


def main() -> None:
    SCHEMA.write_text(with_settings(SCHEMA.read_text()))


if __name__ == "__main__":
    main()
