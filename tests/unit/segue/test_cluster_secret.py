"""What is made from a cluster secret, and what never shows of it."""

from __future__ import annotations

import pytest

from segue.cluster_secret import ClusterSecret, cache_salt, differing_secret, new_secret
from segue.config import RouterSettings, WorkerSettings
from segue.errors import ConfigError

TEXT = "0123456789abcdef" * 4
ROUTER = {"cluster_id": "c", "redis": "redis://:swordfish@host/0", "model_dir": "/m", "model_name": "m"}


def test_keys_differ_by_purpose_and_by_secret_and_are_the_same_in_every_process():
    secret, other = ClusterSecret(TEXT), ClusterSecret(new_secret())
    keys = {secret.key("kv sockets"), secret.key("link authority"), other.key("kv sockets"), other.key("link authority")}
    assert len(keys) == 4
    assert all(len(key) == 32 for key in keys)
    # Pinned: processes of two versions of Segue must agree.
    assert ClusterSecret(TEXT).key("kv sockets").hex()[:16] == "1848c1080c11fcee"


def test_salts_separate_tenants_from_each_other_and_from_those_without_one():
    secret = ClusterSecret(TEXT)
    salts = [cache_salt(tenant, secret) for tenant in ("", "a", "b")]
    assert salts[0] == b""
    assert len(set(salts)) == 3
    assert cache_salt("a", ClusterSecret(TEXT)) == salts[1]
    assert cache_salt("a", None) not in {b"", cache_salt("b", None), salts[1]}


def test_a_short_secret_is_refused_without_being_shown():
    with pytest.raises(ConfigError) as refused:
        RouterSettings.load(flags=ROUTER, env={"SEGUE_CLUSTER_SECRET": "hunter2"})
    assert "cluster_secret" in refused.value.message
    assert "hunter2" not in refused.value.message


@pytest.mark.parametrize("kind", [RouterSettings, WorkerSettings])
def test_settings_show_no_secret_but_pass_it_on(kind):
    fields = ROUTER | {"cluster_secret": TEXT} | ({"worker_id": "w", "roles": "decode"} if kind is WorkerSettings else {})
    settings = kind.load(flags=fields, env={})
    assert TEXT not in repr(settings)
    assert "swordfish" not in repr(settings)
    assert kind.load(env=settings.to_env()).secret.fingerprint == ClusterSecret(TEXT).fingerprint
    assert kind.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    ("theirs", "own", "problem"),
    [("aa", "aa", None), ("", "", None), ("aa", "bb", "another one"), ("aa", "", "this process none"), ("", "aa", "has none")],
)
def test_processes_with_different_secrets_are_told_so(theirs, own, problem):
    error = differing_secret("worker decode-0", theirs, own)
    if problem is None:
        assert error is None
    else:
        assert error is not None
        assert problem in error.message
        assert "SEGUE_CLUSTER_SECRET" in error.message
