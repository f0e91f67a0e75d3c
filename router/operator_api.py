"""segue.v1.OperatorService on the router's front."""

from __future__ import annotations

import grpc
import grpc.aio

from router.grpc_api import parse, unary
from router.operations import DEFAULT_GRACE_S, Operator
from router.overview import look
from router.service import Service
from segue.errors import InvalidRequest
from segue.v1 import operator_pb2 as pb
from segue.v1 import worker_pb2

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["OperatorService"].full_name


def add_operator_service(server: grpc.aio.Server, service: Service, operator: Operator) -> None:
    servicer = OperatorServicer(service, operator)
    methods = {
        "Explain": servicer.explain,
        "GetOverview": servicer.get_overview,
        "DrainWorker": servicer.drain_worker,
        "RestartWorker": servicer.restart_worker,
        "SetWorkerRole": servicer.set_worker_role,
        "ScaleWorkers": servicer.scale_workers,
    }
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        name: grpc.unary_unary_rpc_method_handler(unary(method)) for name, method in methods.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))


class OperatorServicer:
    """One method for each rpc; requests and responses are serialized messages."""

    def __init__(self, service: Service, operator: Operator) -> None:
        self._service = service
        self._records = service.records
        self._operator = operator

    async def explain(self, data: bytes) -> bytes:
        request = parse(pb.ExplainRequest, data)
        if request.request_id:
            record = self._records.find(request.request_id)
            missing = f"{request.request_id[:100]!r} is not among the latest requests of this router"
        else:
            record = next(iter(self._records.latest(1)), None)
            missing = "this router has served no request yet"
        if record is None:
            raise InvalidRequest("request_id", missing)
        return pb.ExplainResponse(record=record).SerializeToString()

    async def get_overview(self, data: bytes) -> bytes:
        return look(self._service, parse(pb.GetOverviewRequest, data)).SerializeToString()

    async def drain_worker(self, data: bytes) -> bytes:
        request = parse(pb.DrainWorkerRequest, data)
        if request.undo:
            status = await self._operator.take_back(request.worker_id)
        else:
            status = await self._operator.drain(
                request.worker_id, _grace_s(request), worker_pb2.DEPARTURE_UNSPECIFIED, force=request.force
            )
        return pb.DrainWorkerResponse(worker=status).SerializeToString()

    async def restart_worker(self, data: bytes) -> bytes:
        request = parse(pb.RestartWorkerRequest, data)
        status = await self._operator.drain(
            request.worker_id, _grace_s(request), worker_pb2.DEPARTURE_RESTART, force=request.force
        )
        return pb.RestartWorkerResponse(worker=status).SerializeToString()

    async def set_worker_role(self, data: bytes) -> bytes:
        request = parse(pb.SetWorkerRoleRequest, data)
        status = await self._operator.set_role(request.worker_id, request.role, request.lease_s, force=request.force)
        return pb.SetWorkerRoleResponse(worker=status).SerializeToString()

    async def scale_workers(self, data: bytes) -> bytes:
        request = parse(pb.ScaleWorkersRequest, data)
        prefill = request.prefill if request.HasField("prefill") else None
        decode = request.decode if request.HasField("decode") else None
        return (await self._operator.scale(prefill, decode)).SerializeToString()


def _grace_s(request: pb.DrainWorkerRequest | pb.RestartWorkerRequest) -> float:
    return request.grace_s if request.HasField("grace_s") else DEFAULT_GRACE_S
