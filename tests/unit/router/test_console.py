"""The console's files, and the state that it asks for. tests/integration/test_console.py loads it in a browser."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from router.console.files import FILES, FOLDER
from router.console.routes import state_json
from router.fake import Script, token_steps
from router.sequence import SequenceRequest, TokenStep
from segue.api_keys import create_key
from segue.client import AsyncClient
from segue.errors import RequestError, WorkerLost
from segue.v1 import inference_pb2 as pb
from segue.v1 import operator_pb2

from .conftest import MODEL, ServeFront

Say = Callable[[str], Script]
BODY = {"model": MODEL, "prompt": "the quick"}
SCRIPTS = sorted(FOLDER.glob("*.js"))


async def test_every_file_is_served_and_may_ask_nothing_but_this_router(serve: ServeFront, say: Say) -> None:
    assert {file.name for file in FILES.values()} == {path.name for path in FOLDER.iterdir()}
    async with serve(say("hi")) as running:
        for path, file in FILES.items():
            response = await running.http.get(path)
            assert (response.status_code, response.content) == (200, (FOLDER / file.name).read_bytes())
            assert response.headers["content-type"].startswith(file.content_type)
            policy = response.headers["content-security-policy"]
            assert policy.startswith("default-src 'self';")
            assert "unsafe" not in policy
            assert response.headers["x-content-type-options"] == "nosniff"
        sent_on = await running.http.get("/console/")
        assert (sent_on.status_code, sent_on.headers["location"]) == (308, "../console")
        assert (await running.http.get("/console/", follow_redirects=True)).status_code == 200
        assert (await running.http.get("/console/files.py")).status_code == 404
        assert (await running.http.post("/console")).status_code == 405


def test_the_page_and_its_scripts_name_files_that_are_served() -> None:
    page = (FOLDER / "console.html").read_text()
    named = set(re.findall(r'(?:href|src)="([^"]+)"', page))
    for script in SCRIPTS:
        named |= {f"console/{name}" for name in re.findall(r'from "\./([^"]+)"', script.read_text())}
    assert {f"/{name}" for name in named} == FILES.keys() - {"/console"}


def test_nothing_in_the_page_needs_a_laxer_policy() -> None:
    page = (FOLDER / "console.html").read_text()
    assert not re.search(r"<style|<script(?![^>]* src=)|\son\w+=|\sstyle=|javascript:", page)
    for script in SCRIPTS:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|localStorage", script.read_text()
        )


def test_every_element_that_a_script_looks_for_is_in_the_page() -> None:
    ids = set(re.findall(r'\sid="([^"]+)"', (FOLDER / "console.html").read_text()))
    wanted = {name for script in SCRIPTS for name in re.findall(r'byId\("([^"]+)"\)', script.read_text())}
    assert wanted
    assert wanted <= ids


async def test_the_state_tells_of_cluster_requests_and_latency(serve: ServeFront, say: Say) -> None:
    async with serve(say("brown fox")) as running:
        load = pb.WorkerLoad(running_requests=2, free_blocks=4, leased_blocks=5, cached_blocks=6, total_blocks=15)
        running.core.workers = [pb.WorkerStatus(worker_id="decode-0", roles=["decode"], state="ready", load=load)]
        answer = await running.http.post("/v1/completions", json=BODY)
        response = await running.http.get("/console/state")
    assert response.headers["cache-control"] == "no-store"
    state = response.json()
    (worker,) = state["cluster"]["workers"]
    assert (worker["worker_id"], worker["load"]["cached_blocks"]) == ("decode-0", 6)
    assert state["cluster"]["missing_roles"] == ["prefill"]
    (request,) = state["requests"]
    assert (request["id"], request["api"], request["outcome"]) == (answer.headers["x-request-id"], "completions", "ok")
    assert request["num_output_tokens"] == answer.json()["usage"]["completion_tokens"]
    (path,) = request["paths"]
    assert (path["prefill_worker"], path["decode_worker"], path["transferred_bytes"]) == ("prefill-0", "decode-0", 4096)
    stages = [span["name"] for span in path["spans"]]
    assert stages[0] == "queue"
    assert stages[-1] == "decode"
    assert state["ttft"]["count"] == 1
    assert state["inter_token"]["count"] == request["num_output_tokens"] - 1
    assert [point["count"] for point in state["ttft"]["points"]] == [1]


async def test_a_request_that_runs_shows_what_it_has(serve: ServeFront) -> None:
    go_on, waits = asyncio.Event(), asyncio.Event()

    def script(request: SequenceRequest) -> Iterator[TokenStep | asyncio.Event]:
        first, second, third = token_steps([5, 6, 7])
        yield from (first, second)
        waits.set()
        yield from (go_on, third)

    async with serve(script) as running:
        asked = asyncio.create_task(running.http.post("/v1/completions", json=BODY | {"max_tokens": 3}))
        await waits.wait()
        (found,) = await requests_of(running.http)
        assert (found["outcome"], found["num_output_tokens"]) == ("running", 2)
        assert found["paths"][0]["spans"][-1]["name"] == "decode"
        go_on.set()
        await asked
        (ended,) = await requests_of(running.http)
        assert (ended["outcome"], ended["num_output_tokens"]) == ("ok", 3)


async def requests_of(http: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await http.get("/console/state")).json()["requests"]
    return found


async def test_a_request_that_is_asked_for_is_there_among_later_ones(
    serve: ServeFront, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.console.routes._NUM_REQUESTS", 2)
    async with serve(say("hi")) as running:
        first = (await running.http.post("/v1/completions", json=BODY)).headers["x-request-id"]
        for _ in range(2):
            await running.http.post("/v1/completions", json=BODY)
        later = (await running.http.get("/console/state")).json()["requests"]
        assert len(later) == 2
        assert first not in [request["id"] for request in later]
        with_first = (await running.http.get("/console/state", params={"request": first})).json()["requests"]
        assert [request["id"] for request in with_first] == [*(request["id"] for request in later), first]
        twice = (await running.http.get("/console/state", params={"request": later[0]["id"]})).json()["requests"]
        assert [request["id"] for request in twice] == [request["id"] for request in later]


async def test_the_files_are_open_and_the_state_is_not(serve: ServeFront, say: Say, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys = {name: create_key(file, name, permissions=(name,)) for name in ("infer", "observe", "operate")}
    async with serve(say("hi"), api_keys_file=file, cluster_secret="s" * 32) as running:
        for path in FILES:
            assert (await running.http.get(path)).status_code == 200
        assert (await running.http.get("/console/state")).status_code == 401
        statuses = {}
        for name, key in keys.items():
            response = await running.http.get("/console/state", headers={"Authorization": f"Bearer {key}"})
            statuses[name] = response.status_code
    assert statuses == {"infer": 403, "observe": 200, "operate": 200}


async def test_the_same_over_grpc(serve: ServeFront, say: Say) -> None:
    async with serve(say("hi")) as running, AsyncClient(running.front.grpc_address) as client:
        await client.generate("hello", max_tokens=4)
        overview = await client.overview()
        assert [record.api for record in overview.requests] == ["grpc"]
        assert (overview.cluster.model, overview.ttft.count) == ("fake", 1)
        assert len((await client.overview(num_requests=0)).requests) == 0
        with pytest.raises(RequestError, match="at most 100") as refused:
            await client.overview(num_requests=101)
        assert refused.value.field == "num_requests"


async def test_failures_are_told(serve: ServeFront) -> None:
    async with serve(lambda _: [WorkerLost("it died")]) as running:
        await running.http.post("/v1/completions", json=BODY)
        (request,) = await requests_of(running.http)
    assert (request["outcome"], request["error"]) == ("worker_lost", "it died")


def test_transfers_are_those_of_the_cluster() -> None:
    rate = pb.TransferRate(prefill_worker="p", decode_worker="d", bytes_per_s=5.0)
    cluster = pb.GetClusterStatusResponse(transfers=[rate], waiting_requests=3)
    state = state_json(operator_pb2.GetOverviewResponse(cluster=cluster))
    assert state["cluster"]["transfers"] == ({"prefill_worker": "p", "decode_worker": "d", "bytes_per_s": 5.0},)
    assert state["cluster"]["waiting_requests"] == 3
