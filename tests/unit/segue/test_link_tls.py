"""Links between members of a cluster, and strangers at their ports."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from segue.cluster_secret import ClusterSecret
from segue.link_tls import CHANNEL_OPTIONS, LinkCredentials, _certificates
from segue.v1 import worker_pb2 as pb
from segue.v1.worker_pb2_grpc import WorkerServiceServicer, WorkerServiceStub, add_WorkerServiceServicer_to_server

SECRET, OTHER = ClusterSecret("s" * 32), ClusterSecret("t" * 32)


class Worker(WorkerServiceServicer):
    async def Link(self, requests, context):  # noqa: N802
        yield pb.LinkResponse(opened=pb.LinkOpened())


@pytest.fixture(scope="module")
async def address() -> AsyncIterator[str]:
    server = grpc.aio.server()
    add_WorkerServiceServicer_to_server(Worker(), server)
    port = server.add_secure_port("127.0.0.1:0", LinkCredentials.of(SECRET).server)
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def opened(channel: grpc.aio.Channel) -> bool:
    async with channel:
        call = WorkerServiceStub(channel).Link(iter([pb.LinkRequest(open=pb.OpenLink(router_id="r"))]), timeout=20)
        return [message.WhichOneof("message") async for message in call] == ["opened"]


async def test_a_process_with_the_same_secret_is_let_in(address):
    credentials = LinkCredentials.of(ClusterSecret("s" * 32)).channel
    assert await opened(grpc.aio.secure_channel(address, credentials, options=CHANNEL_OPTIONS))


async def test_a_process_with_another_secret_is_not(address):
    channel = grpc.aio.secure_channel(address, LinkCredentials.of(OTHER).channel, options=CHANNEL_OPTIONS)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await opened(channel)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_neither_is_one_without_any(address):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await opened(grpc.aio.insecure_channel(address))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_one_that_trusts_the_certificate_but_has_none_itself_is_not_let_in(address):
    authority, _, _ = _certificates(SECRET)
    channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(authority), options=CHANNEL_OPTIONS)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await opened(channel)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
