"""The OpenAPI description of the HTTP API, made from what checks requests, so that it cannot say anything else."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from pydantic import BaseModel

from router.openai.schema import ChatRequest, CompletionRequest

_DIALECT = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                # The field at fault, if one is.
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
# `data` is a chunk, as JSON, or [DONE]; a stream can be gone on with after the event of an `id`.
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"id": {"type": "string"}, "data": {"type": "string"}},
}
_STATUSES = {
    "400": "A field is wrong; `param` names it",
    "404": "The model is not served here",
    "413": "The body is too large",
    "429": "Too much is asked of the cluster; Retry-After says when to come again",
    "503": "The cluster cannot serve this now; Retry-After says when to come again",
    "504": "The time allowed is over",
}


def describe() -> dict[str, Any]:
    """OpenAPI 3.1."""
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths = {
        "/v1/completions": {"post": _generation("Continue prompts", CompletionRequest, schemas)},
        "/v1/chat/completions": {"post": _generation("Answer a conversation", ChatRequest, schemas)},
        "/v1/models": {"get": _reading("The models that are served")},
        "/health": {"get": _reading("Whether the router runs")},
        "/ready": {"get": _reading("Whether a request would be served", failures=("503",))},
        "/metrics": {"get": _reading("Metrics for Prometheus", media="text/plain")},
        "/console/state": {"get": _reading("What the web console shows, which is at /console")},
        "/openapi.json": {"get": _reading("This description")},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Segue", "version": version("segue")},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _generation(summary: str, model: type[BaseModel], schemas: dict[str, Any]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template=_DIALECT)
    schemas |= schema.pop("$defs", {})
    schemas[model.__name__] = schema
    content = {"application/json": {"schema": {"$ref": _DIALECT.format(model=model.__name__)}}}
    answer = {
        "description": "The answer, or its chunks as they come",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {"schema": _EVENT}},
    }
    headers = {
        "X-Request-Timeout": ("Seconds in which the whole answer is wanted", {"type": "number", "exclusiveMinimum": 0}),
        "Last-Event-ID": ("Goes on with a stream that broke, after the event of this id", {"type": "string"}),
    }
    return {
        "summary": summary,
        "parameters": [
            {"name": name, "in": "header", "required": False, "description": text, "schema": schema}
            for name, (text, schema) in headers.items()
        ],
        "requestBody": {"required": True, "content": content},
        "responses": {"200": answer} | _failures(*_STATUSES),
    }


def _reading(summary: str, *, media: str = "application/json", failures: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {"200": {"description": summary, "content": {media: {}}}} | _failures(*failures, schema={}),
    }


def _failures(*statuses: str, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    shown = {"$ref": _DIALECT.format(model="Error")} if schema is None else schema
    return {
        status: {"description": _STATUSES[status], "content": {"application/json": {"schema": shown}}} for status in statuses
    }
