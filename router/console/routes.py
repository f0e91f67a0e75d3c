"""The console over HTTP. Its files come out of memory, with headers that let the page load and ask nothing but this router."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from aiohttp import web

from router.console.files import FILES, FOLDER, WITH_SLASH, StaticFile
from router.openai.responses import to_json
from router.overview import look
from router.service import Service
from router.waterfall import failures_of, spans_of
from segue.client.status import status_from_pb
from segue.v1 import operator_pb2
from segue.v1.inference_pb2 import RequestPath

_NUM_REQUESTS = 30
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def console_routes(service: Service) -> list[web.RouteDef]:
    async def state(request: web.Request) -> web.Response:
        asked = operator_pb2.GetOverviewRequest(num_requests=_NUM_REQUESTS, request_id=request.query.get("request", ""))
        body = to_json(state_json(look(service, asked)))
        headers = _HEADERS | {"Cache-Control": "no-store"}
        return web.Response(text=body, content_type="application/json", headers=headers)

    files = [web.get(path, _serve_file(file)) for path, file in FILES.items()]
    return [*files, web.get(WITH_SLASH, _send_on), web.get("/console/state", state)]


async def _send_on(_request: web.Request) -> web.Response:
    """Relative too, for a proxy that puts the router under a path."""
    return web.Response(status=308, headers=_HEADERS | {"Location": "../console"})


def _serve_file(file: StaticFile) -> Any:
    body = (FOLDER / file.name).read_bytes()

    async def serve(request: web.Request) -> web.Response:
        return web.Response(body=body, content_type=file.content_type, charset="utf-8", headers=_HEADERS)

    return serve


def state_json(overview: operator_pb2.GetOverviewResponse) -> dict[str, Any]:
    """The cluster as `segue status --json` has it, requests as `segue explain` draws them. Times in seconds."""
    cluster = status_from_pb(overview.cluster)
    return {
        "now_unix_s": overview.now_unix_s,
        "cluster": asdict(cluster) | {"missing_roles": cluster.missing_roles},
        "requests": [_request_json(record) for record in overview.requests],
        "ttft": _latency_json(overview.ttft),
        "inter_token": _latency_json(overview.inter_token),
    }


def _request_json(record: operator_pb2.RequestRecord) -> dict[str, Any]:
    return {
        "id": record.request_id,
        "api": record.api,
        "arrived_unix_s": record.arrived_unix_s,
        "outcome": record.outcome,
        "error": record.error,
        "num_prompt_tokens": record.num_prompt_tokens,
        "num_output_tokens": record.num_output_tokens,
        "paths": [_path_json(path) for path in record.paths],
    }


def _path_json(path: RequestPath) -> dict[str, Any]:
    return {
        "prefill_worker": path.prefill_worker,
        "decode_worker": path.decode_worker,
        "transport": path.transport,
        "placement": path.placement,
        "prefill_cached_tokens": path.prefill_cached_tokens,
        "prefill_pulled_tokens": path.prefill_pulled_tokens,
        "decode_cached_tokens": path.decode_cached_tokens,
        "transferred_bytes": path.transferred_bytes,
        "ttft_s": path.ttft_s,
        "total_s": path.total_s,
        "spans": [asdict(span) for span in spans_of(path)],
        "failures": list(failures_of(path)),
    }


def _latency_json(latency: operator_pb2.Latency) -> dict[str, Any]:
    points = [
        {"age_s": point.age_s, "count": point.count, "p50_s": point.p50_s, "p99_s": point.p99_s} for point in latency.points
    ]
    return {
        "count": latency.count,
        "p50_s": latency.p50_s,
        "p99_s": latency.p99_s,
        "point_s": latency.point_s,
        "points": points,
    }
