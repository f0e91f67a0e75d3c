"""The cluster and what this router has served lately, in one message: what `segue top` and the console show."""

from __future__ import annotations

import time

from router.service import Service
from segue.errors import InvalidRequest
from segue.v1 import operator_pb2 as pb

MAX_REQUESTS = 100


def look(service: Service, request: pb.GetOverviewRequest) -> pb.GetOverviewResponse:
    """Raises InvalidRequest."""
    if request.num_requests > MAX_REQUESTS:
        raise InvalidRequest("num_requests", f"at most {MAX_REQUESTS}, not {request.num_requests}")
    requests = service.records.latest(request.num_requests)
    asked_for = service.records.find(request.request_id) if request.request_id else None
    if asked_for is not None and all(record.request_id != asked_for.request_id for record in requests):
        requests.append(asked_for)
    return pb.GetOverviewResponse(
        now_unix_s=time.time(),
        cluster=service.server.status(),
        requests=requests,
        ttft=service.metrics.recent_ttft.to_pb(),
        inter_token=service.metrics.recent_inter_token.to_pb(),
    )
