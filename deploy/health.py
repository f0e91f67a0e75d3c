"""`python -m deploy.health`: exit code 0 if the router or worker of this container is well, for engines that ask by a command.

It reads the environment that the process itself has. Kubernetes needs no such command: it asks over HTTP and gRPC.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.probe import ask, own_tls
from deploy.router_process import reachable
from deploy.worker_health import LIVENESS
from segue.client import Access
from segue.config import LOOPBACK, DoorSettings

_LIMIT_S = 5.0


def complaint(env: Mapping[str, str]) -> str:
    """What is wrong; empty if nothing is."""
    host = env.get("SEGUE_HOST", LOOPBACK)
    if "SEGUE_ROLES" in env:
        return _worker_complaint(f"{host}:{env.get('SEGUE_HEALTH_PORT', '0')}")
    tls = own_tls(DoorSettings.load(env=env), Access.from_env(env))
    answer = ask(reachable(f"{host}:{env.get('SEGUE_HTTP_PORT', '8000')}"), "/health", _LIMIT_S, tls)
    return "" if answer.is_ok else f"status {answer.status}: {answer.body}"


def _worker_complaint(address: str) -> str:
    statuses = health_pb2.HealthCheckResponse
    try:
        with grpc.insecure_channel(address) as channel:
            request = health_pb2.HealthCheckRequest(service=LIVENESS)
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=_LIMIT_S)
    except grpc.RpcError as error:
        return f"{address}: {error}"
    return "" if response.status == statuses.SERVING else f"{address}: {statuses.ServingStatus.Name(response.status)}"


def main() -> int:
    if problem := complaint(os.environ):
        sys.stderr.write(problem + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
