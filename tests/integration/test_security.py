"""Who is let in, and who sees whose prefix cache, in a whole cluster."""

from __future__ import annotations

import pytest

from segue import AsyncClient
from segue.api_keys import create_key
from segue.client import Access
from segue.errors import Unauthenticated
from tests.support.cluster import Cluster, in_process_cluster

SECRET = "s" * 32
PROMPT = list(range(1, 30))


async def test_a_cluster_with_a_secret_serves_over_every_socket(valkey, tiny_model_dir):
    secret = {"cluster_secret": SECRET}
    async with in_process_cluster(valkey.url, tiny_model_dir, router=secret, kv_transport="tcp", **secret) as cluster:
        answer = await cluster.client.generate(PROMPT, max_tokens=3, temperature=0.0)
        assert answer.path.transport in {"tcp", "local"}
        assert len(answer.choices[0].token_ids) == 3


async def test_no_tenant_sees_another_in_the_prefix_cache(valkey, tiny_model_dir, tmp_path, monkeypatch):
    file = tmp_path / "keys.json"
    keys = {name: create_key(file, name, tenant) for name, tenant in (("a1", "a"), ("a2", "a"), ("b1", "b"))}
    # The cluster waits for itself by its own client.
    monkeypatch.setenv("SEGUE_API_KEY", keys["b1"])
    router = {"cluster_secret": SECRET, "api_keys_file": file, "disaggregate": "always"}
    async with in_process_cluster(valkey.url, tiny_model_dir, router=router, cluster_secret=SECRET) as cluster:
        tokens, cached = {}, {}
        for caller in ("a1", "a1", "a2", "b1", "b1"):
            path, token_ids = await ask(cluster, keys[caller])
            cached.setdefault(caller, []).append((path.prefill_cached_tokens, path.decode_cached_tokens))
            tokens[caller] = token_ids
        whole = 28  # The prompt's full blocks of 4 tokens.
        assert cached["a1"][0] == (0, 0)
        assert cached["a1"][1] == cached["a2"][0] == cached["b1"][1] == (whole, whole)
        assert cached["b1"][0] == (0, 0)
        # Caches change what an answer costs, not what it is.
        assert tokens["a1"] == tokens["a2"] == tokens["b1"]
        async with AsyncClient(cluster.front.grpc_address, access=Access()) as stranger:
            with pytest.raises(Unauthenticated):
                await stranger.generate(PROMPT, max_tokens=2)


async def ask(cluster: Cluster, key: str):
    async with AsyncClient(cluster.front.grpc_address, access=Access(api_key=key)) as client:
        answer = await client.generate(PROMPT, max_tokens=3, temperature=0.0)
        return answer.path, answer.choices[0].token_ids
