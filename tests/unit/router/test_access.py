"""Who may call what: keys in their file, and both APIs behind them."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import grpc
import grpc.aio
import pytest

from router import file_watch
from router.access import Access, grpc_needs, http_needs
from router.caller import ANONYMOUS
from segue import AsyncClient, SegueError
from segue import client as client_library
from segue.api_keys import create_key, find_key, read_keys, revoke_key
from segue.client import RetryPolicy
from segue.cluster_secret import ClusterSecret, cache_salt
from segue.errors import ConfigError, PermissionDenied, Unauthenticated
from segue.v1 import inference_pb2 as pb
from segue.v1.inference_pb2_grpc import InferenceServiceStub

SECRET = ClusterSecret("s" * 32)
BODY = {"model": "tiny/chat", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_a_file_everybody_is_the_anonymous_caller():
    assert Access(None, SECRET).caller(None, grpc_needs("/segue.v1.OperatorService/Drain")) is ANONYMOUS


def test_a_key_says_whose_call_it_is_and_what_its_limits_are(file):
    key = create_key(file, "ann-laptop", "ann", requests_per_minute=7, weight=2.0, best_priority=3)
    caller = Access(file, SECRET).caller(f"bearer {key}", http_needs("/v1/chat/completions"))
    assert (caller.tenant, caller.weight, caller.limits.requests_per_minute) == ("ann", 2.0, 7)
    assert caller.cache_salt == cache_salt("ann", SECRET) != b""
    assert [caller.asking(priority).priority for priority in (-5, 3, 9)] == [3, 3, 9]


def test_keys_of_one_tenant_share_its_salt_and_others_do_not(file):
    keys = [create_key(file, name, tenant) for name, tenant in (("a1", "a"), ("a2", "a"), ("b1", "b"))]
    salts = [Access(file, SECRET).caller(f"Bearer {key}", http_needs("/v1/models")).cache_salt for key in keys]
    assert salts[0] == salts[1] != salts[2]


def test_what_is_no_key_or_another_is_refused(file):
    key = create_key(file, "ann")
    access = Access(file, SECRET)
    other = create_key(file, "bob")  # not read yet
    for wrong in (
        None,
        "",
        "Basic abc",
        "Bearer",
        f"Bearer {key}x",
        f"Bearer {key[:-1]}",
        "Bearer segue_é_ü",
        f"Bearer {other}",
    ):
        with pytest.raises(Unauthenticated) as refused:
            access.caller(wrong, http_needs("/v1/models"))
        assert key not in refused.value.message


@pytest.mark.parametrize(
    ("needs", "allowed"),
    [
        (http_needs("/v1/completions"), {"infer"}),
        (http_needs("/metrics"), {"observe"}),
        (http_needs("/console/state"), {"observe", "operate"}),
        (http_needs("/console/state/"), {"operate"}),
        (http_needs("/anything/new"), {"operate"}),
        (grpc_needs("/segue.v1.InferenceService/Generate"), {"infer"}),
        (grpc_needs("/segue.v1.InferenceService/GetClusterStatus"), {"infer", "observe", "operate"}),
        (grpc_needs("/segue.v1.OperatorService/Drain"), {"operate"}),
        (grpc_needs("/segue.v1.OperatorService/Explain"), {"operate"}),
        (grpc_needs("/segue.v1.OperatorService/GetOverview"), {"observe", "operate"}),
        (grpc_needs("/unknown"), {"operate"}),
    ],
)
def test_each_call_needs_its_permission_and_no_other_gives_it(file, needs, allowed):
    for permission in ("infer", "observe", "operate"):
        key = create_key(file, permission, permissions=(permission,))
        access = Access(file, SECRET)
        if permission in allowed:
            assert access.caller(f"Bearer {key}", needs).tenant == permission
        else:
            with pytest.raises(PermissionDenied, match=permission):
                access.caller(f"Bearer {key}", needs)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "Invalid JSON"),
        ("{}", "keys"),
        ('{"keys": [{"name": "a b"}]}', r"keys\.0\.name"),
        ('{"keys": [], "extra": 1}', "extra"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_what_is_wrong(file, content, named):
    file.write_text(content)
    with pytest.raises(ConfigError, match=named):
        Access(file, SECRET)


def test_two_keys_of_one_name_are_refused(file):
    create_key(file, "ann")
    entry = json.loads(file.read_text())["keys"][0]
    file.write_text(json.dumps({"keys": [entry, entry]}))
    with pytest.raises(ConfigError, match="same name"):
        read_keys(file)


def test_the_hash_alone_is_kept_and_only_the_whole_key_is_of_it(file):
    key = create_key(file, "ann")
    (entry,) = read_keys(file)
    assert find_key([entry], key) == entry
    assert find_key([entry], f"segue_{entry.key_id}_{entry.sha256}") is None
    assert len(key.split("_", 2)[2]) >= 43  # 256 bits in base64


async def test_changes_of_the_file_are_taken_over_and_broken_ones_are_not(file, caplog):
    first = create_key(file, "first")
    changes: asyncio.Queue[None] = asyncio.Queue()

    def reload() -> None:
        try:
            access._load()
        finally:
            changes.put_nowait(None)

    access = Access(file, SECRET)
    following = asyncio.create_task(file_watch.follow([file], reload, file_watch.stamp_of([file]), look_s=0.001))
    second = create_key(file, "second")
    await changes.get()
    assert access.caller(f"Bearer {second}", http_needs("/v1/models")).tenant == "second"
    revoke_key(file, "first")
    await changes.get()
    with pytest.raises(Unauthenticated):
        access.caller(f"Bearer {first}", http_needs("/v1/models"))
    with caplog.at_level(logging.ERROR):
        file.write_text("{")
        await changes.get()
    assert "api_keys_file" in caplog.text
    assert access.caller(f"Bearer {second}", http_needs("/v1/models")).tenant == "second"
    following.cancel()


async def test_http_asks_for_a_key_before_it_reads_anything(serve, say, file):
    key = create_key(file, "ann")
    async with serve(say("hi"), api_keys_file=file, cluster_secret="s" * 32) as running:
        answer = await running.http.post("/v1/chat/completions", json=BODY, headers=bearer(key))
        assert answer.status_code == 200
        (request,) = running.core.requests
        assert request.caller.tenant == "ann"
        refused = await running.http.post("/v1/chat/completions", content=b"x" * 100_000)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["code"] == "unauthenticated"
        denied = await running.http.get("/metrics", headers=bearer(key))
        assert (denied.status_code, denied.json()["error"]["type"]) == (403, "permission_error")
        assert (await running.http.get("/health")).status_code == 200
        assert (await running.http.get("/nowhere")).status_code == 401


async def test_grpc_asks_for_a_key_and_the_client_takes_it(serve, say, file):
    key = create_key(file, "ann")
    async with serve(say("hi"), api_keys_file=file) as running:
        address = running.front.grpc_address
        async with AsyncClient(address, access=client_library.Access(api_key=key)) as client:
            assert (await client.generate("hello", max_tokens=4)).text
            await client.status()
        assert [request.caller.tenant for request in running.core.requests] == ["ann"]
        once = RetryPolicy(max_attempts=1)
        for wrong in (None, "segue_0_0"):
            async with AsyncClient(address, access=client_library.Access(api_key=wrong), retry=once) as client:
                for call in (client.generate("hello"), client.models(), client.status()):
                    with pytest.raises(Unauthenticated) as refused:
                        await call
                    assert not refused.value.retryable
        async with grpc.aio.insecure_channel(address) as channel:
            call = InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_the_caller_of_one_request_is_not_that_of_the_next_on_its_connection(serve, say, file):
    keys = [create_key(file, name) for name in ("ann", "bob")]
    async with serve(say("hi"), api_keys_file=file) as running:
        for key in keys * 2:
            await running.http.post("/v1/chat/completions", json=BODY, headers=bearer(key))
        assert [request.caller.tenant for request in running.core.requests] == ["ann", "bob"] * 2


def test_a_client_takes_its_access_from_the_environment_and_does_not_show_it():
    access = client_library.Access.from_env({"SEGUE_API_KEY": "segue_1_2", "SEGUE_CA": "/ca.pem"})
    assert access.metadata == (("authorization", "Bearer segue_1_2"),)
    assert access.ca == Path("/ca.pem")
    assert "segue_1_2" not in repr(access)
    for wrong in ({"SEGUE_CLIENT_CERT": "/c.pem"}, {"SEGUE_API_KEY": "segue_1_2\n"}):
        with pytest.raises(SegueError, match=next(iter(wrong))):
            client_library.Access.from_env(wrong)
