"""Who is let in, and who sees whose prefix cache, in a whole cluster."""

from __future__ import annotations

from tests.support.cluster import in_process_cluster

SECRET = "s" * 32


async def test_a_cluster_with_a_secret_serves_over_every_socket(valkey, tiny_model_dir):
    secret = {"cluster_secret": SECRET}
    async with in_process_cluster(valkey.url, tiny_model_dir, router=secret, kv_transport="tcp", **secret) as cluster:
        answer = await cluster.client.generate([1, 2, 3, 4, 5, 6], max_tokens=3, temperature=0.0)
        assert answer.path.transport == "tcp"
        assert len(answer.choices[0].token_ids) == 3
