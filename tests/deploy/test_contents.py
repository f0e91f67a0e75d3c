"""What rendered objects carry inside: a store's configuration, expressions of PromQL."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import promql_parser
import redis
import yaml

from deploy.valkey import server_binary
from tests.deploy.charts import CHART, main_container, pick, render
from tests.unit.deploy.conftest import free_port


def test_the_store_starts_with_its_configuration_and_takes_the_password(tmp_path: Path) -> None:
    """The very command of the pod, with a real Valkey; only its folders and its port are others."""
    objects, port = render(), free_port()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/valkey-server").symlink_to(server_binary())
    config = pick(objects, "ConfigMap", "-valkey")["data"]["valkey.conf"]
    folders = {"/etc/valkey": tmp_path, "/run/valkey": tmp_path / "run", "/data": tmp_path / "data"}
    (shell, flag, script) = main_container(pick(objects, "StatefulSet", "-valkey"))["command"]
    for folder, here in folders.items():
        here.mkdir(exist_ok=True)
        config, script = config.replace(folder, str(here)), script.replace(folder, str(here))
    (tmp_path / "valkey.conf").write_text(config.replace("port 6379", f"port {port}").replace("bind * -::*", "bind 127.0.0.1"))
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VALKEY_PASSWORD": "p4ssw0rd"}
    with subprocess.Popen([shell, flag, script], env=env, stdout=subprocess.PIPE, text=True) as store:
        try:
            assert store.stdout is not None
            assert any("Ready to accept connections" in line for line in store.stdout)
            client = redis.Redis.from_url(f"redis://:p4ssw0rd@127.0.0.1:{port}/0")
            assert client.incr("epoch") == 1
            assert client.config_get("appendonly") == {"appendonly": "yes"}
            client.close()
            refused = redis.Redis(port=port)
            try:
                refused.ping()
            except redis.AuthenticationError:
                pass
            else:
                raise AssertionError("the store asks for no password")
            finally:
                refused.close()
        finally:
            store.terminate()
    assert (tmp_path / "run/auth.conf").stat().st_mode & 0o077 == 0


def test_expressions_are_promql() -> None:
    objects = render("-f", str(CHART / "values-ha.yaml"))
    expressions = [rule["expr"] for rule in pick(objects, "PrometheusRule", "segue")["spec"]["groups"][0]["rules"]]
    scalers = [one for one in objects if one["kind"] == "ScaledObject"]
    expressions += [trigger["metadata"]["query"] for one in scalers for trigger in one["spec"]["triggers"]]
    dashboard = json.loads(pick(objects, "ConfigMap", "-dashboard")["data"]["segue.json"])
    targets = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [target.replace("$__rate_interval", "5m") for target in targets]
    assert len(expressions) > 25
    for expression in expressions:
        promql_parser.parse(expression)


def test_alerts_reach_prometheus_unchanged() -> None:
    """Templates of Prometheus, {{ $labels... }}, are none of Helm's."""
    rules = pick(render("-f", str(CHART / "values-ha.yaml")), "PrometheusRule", "segue")["spec"]["groups"][0]["rules"]
    assert rules == yaml.safe_load((CHART / "files/alerts.yaml").read_text())
