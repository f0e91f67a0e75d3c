"""The Helm chart, rendered by a real Helm: for every file of values and a matrix of options."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from segue.config import ClusterSettings, RouterSettings, WorkerSettings
from tests.deploy.charts import (
    BIN,
    CASES,
    CHART,
    RAY,
    Case,
    Object,
    Refused,
    containers,
    helm,
    main_container,
    pick,
    pod_templates,
    render,
)
from tests.deploy.policies import may_connect, restricted_errors
from tests.deploy.schemas import on_all_minors

CHECKOV = BIN.parent / "checkov/bin/checkov"
# Settings that are read by libraries, or by the command line before there are settings.
NOT_SETTINGS = {"home", "model", "model_name"}
# What checkov finds and is meant to be so.
EXPLAINED = {
    "CKV_K8S_35": "secrets as environment: settings come from the environment, and none shows in a process list",
    "CKV_K8S_43": "images by digest: values take any reference, a chart cannot know yours",
    "CKV_K8S_15": "images are versioned: pulling them each time makes a restart depend on the registry",
    "CKV_K8S_21": "the namespace is Helm's --namespace",
}

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_objects_are_valid(case: Case) -> None:
    assert list(on_all_minors(render(*case.words))) == []


@every_case
def test_lint_finds_nothing(case: Case) -> None:
    words = [word for word in case.words if word not in RAY]
    if case.more != RAY:  # lint knows no cluster with other APIs
        helm("lint", "--strict", "--quiet", str(CHART), *words)


@every_case
def test_pods_are_restricted(case: Case) -> None:
    assert [error for one in render(*case.words) for error in restricted_errors(one)] == []


@every_case
def test_processes_take_their_environment(case: Case) -> None:
    """Every SEGUE_ variable is a setting, and its value one that the process itself accepts."""
    seen = set()
    for pod in [pod for one in render(*case.words) for pod in pod_templates(one)]:
        for container in containers(pod):
            env = {entry["name"]: entry.get("value", "given" * 8) for entry in container.get("env", [])}
            match container.get("args"):
                case ["segue", "router"]:
                    check_settings(RouterSettings, env, {"model_dir": "/m", "model_name": "m"})
                case ["segue", "worker"]:
                    check_settings(WorkerSettings, env, {"model_dir": "/m", "model_name": "m"})
                case ["segue", "up", *_]:
                    check_settings(ClusterSettings, env, {})
                case _:
                    continue
            seen.add(container["args"][1])
    assert seen == ({"router", "up"} if case.more == RAY else {"router", "worker"})


def check_settings(kind: Any, env: dict[str, str], flags: dict[str, str]) -> None:
    kind.load(flags=flags, env=env)
    names = {name.removeprefix("SEGUE_").lower() for name in env if name.startswith("SEGUE_")}
    assert names - NOT_SETTINGS <= kind.model_fields.keys()


@every_case
def test_names_and_labels_meet(case: Case) -> None:
    """Selectors select the pods that are made beside them; volumes that are mounted are there."""
    objects = render(*case.words)
    labelled = [pod["metadata"]["labels"] for one in objects for pod in pod_templates(one)]
    for one in objects:
        selector = one.get("spec", {}).get("selector")
        if one["kind"] in {"Service", "Deployment", "StatefulSet", "PodDisruptionBudget"}:
            wanted = selector.get("matchLabels", selector)
            assert any(wanted.items() <= found.items() for found in labelled), one["metadata"]["name"]
        for pod in pod_templates(one):
            volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
            volumes |= {claim["metadata"]["name"] for claim in one["spec"].get("volumeClaimTemplates", [])}
            mounted = {mount["name"] for container in containers(pod) for mount in container.get("volumeMounts", [])}
            assert mounted <= volumes
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(names) == len(set(names))


@every_case
def test_the_notes_tell_the_first_request(case: Case) -> None:
    if case.more == RAY:  # needs a cluster with KubeRay
        return
    notes = helm("install", "segue", str(CHART), "--dry-run=client", "--namespace", "models", *case.words).partition("NOTES:")[
        2
    ]
    assert "/v1/chat/completions" in notes
    body = notes.partition("-d '")[2].partition("'")[0]
    assert json.loads(body)["messages"]


# Labels of a pod that is none of Segue's.
OTHER = {"app": "other"}


def labels(component: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "segue",
        "app.kubernetes.io/instance": "segue",
        "app.kubernetes.io/component": component,
    }


class TestNetwork:
    @pytest.mark.parametrize("case", [case for case in CASES if case.name in {"default", "ranks", "gpu"}], ids=lambda c: c.name)
    def test_only_routers_reach_workers_and_only_workers_their_kv_ports(self, case: Case) -> None:
        objects = render(*case.words)
        router, prefill, decode, valkey = map(labels, ("router", "prefill", "decode", "valkey"))
        for worker in (prefill, decode):
            for source, grpc, kv in (
                (router, True, False),
                (prefill, None, True),
                (decode, None, True),
                (valkey, False, False),
            ):
                if grpc is not None:
                    assert may_connect(objects, source, worker, 50061) is grpc
                assert may_connect(objects, source, worker, 50071) is kv
            assert not may_connect(objects, OTHER, worker, 50061)
            assert not may_connect(objects, router, worker, 50062)
            assert not may_connect(objects, OTHER, worker, 50071)
            assert may_connect(objects, worker, valkey, 6379)
            assert not may_connect(objects, worker, OTHER, 8080)
            if case.name != "gpu":  # torch.distributed picks its ports
                assert not may_connect(objects, prefill, worker, 50061)
                assert may_connect(objects, prefill, worker, 50074) is (case.name == "ranks")
                assert not may_connect(objects, prefill, worker, 50075)
        assert may_connect(objects, OTHER, router, "http")
        assert may_connect(objects, OTHER, router, "grpc")
        assert may_connect(objects, router, valkey, 6379)
        assert not may_connect(objects, OTHER, valkey, 6379)

    def test_another_release_is_another(self) -> None:
        objects = render()
        stranger = labels("router") | {"app.kubernetes.io/instance": "second"}
        assert not may_connect(objects, stranger, labels("prefill"), 50061)
        assert not may_connect(objects, stranger, labels("valkey"), 6379)

    def test_named_clients_alone_reach_routers(self) -> None:
        (case,) = [case for case in CASES if case.name == "restricted-network"]
        assert not may_connect(render(*case.words), OTHER, labels("router"), "http")
        assert may_connect(render(*case.words), labels("test"), labels("router"), "http")


@every_case
def test_pods_are_given_the_time_that_their_end_takes(case: Case) -> None:
    for one in render(*case.words):
        for pod in pod_templates(one):
            for container in containers(pod):
                env = {entry["name"]: entry.get("value") for entry in container.get("env", [])}
                if (drain_s := env.get("SEGUE_DRAIN_S")) is not None:
                    sleep_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
                    lease_s = int(env.get("SEGUE_TICKET_LEASE_MS", 10_000)) / 1000 if "SEGUE_ROLES" in env else 0
                    assert pod["spec"]["terminationGracePeriodSeconds"] >= int(drain_s) + sleep_s + lease_s + 5


@pytest.mark.parametrize(("endpoint", "port"), [("http://collector.monitoring:4318", 4318), ("https://traces.example", 443)])
def test_every_process_reaches_the_collector(endpoint: str, port: int) -> None:
    objects = render("--set", f"observability.otlp_endpoint={endpoint}")
    for kind, name in (("Deployment", "-router"), ("StatefulSet", "-prefill"), ("StatefulSet", "-decode")):
        env = {one["name"]: one.get("value") for one in main_container(pick(objects, kind, name))["env"]}
        assert (env["SEGUE_OTLP_ENDPOINT"], env["SEGUE_LOG_FORMAT"]) == (endpoint, "json")
    for name in ("-router", "-workers"):
        rules = pick(objects, "NetworkPolicy", name)["spec"]["egress"]
        assert {"port": port, "protocol": "TCP"} in [one for rule in rules for one in rule["ports"]]


@pytest.mark.parametrize(
    ("sets", "problem"),
    [
        ('{"router": {"replica": 3}}', "at '/router': additional properties 'replica' not allowed"),
        ('{"engine": {"dtype": "float16"}}', "at '/engine/dtype': value must be one of"),
        ('{"engine": {"kv_memory": "lots"}}', "at '/engine/kv_memory'"),
        ('{"prefill": {"settings": {"device": "cuda"}}}', "additional properties 'device' not allowed"),
        ('{"prefill": {"replicas": 0}}', "at '/prefill/replicas'"),
        ('{"router": {"httpPort": 80}}', "at '/router/httpPort'"),
        ('{"model": {"storage": {"size": "5 gigabytes"}}}', "at '/model/storage/size'"),
        ('{"workers": {"mode": "slurm"}}', "at '/workers/mode'"),
        ('{"valkey": {"enabled": false}}', "redis.existingSecret: without valkey.enabled it must name"),
        ('{"redis": {"existingSecret": "mine"}}', "redis.existingSecret: set valkey.enabled to false"),
        ('{"model": {"download": false}}', "model.storage.existingClaim: without model.download"),
        (
            '{"model": {"download": false, "storage": {"existingClaim": "a"}}}',
            "model.name: without model.download it must be a directory",
        ),
        ('{"model": {"storage": {"create": true, "existingClaim": "a"}}}', "model.storage.existingClaim: set"),
        ('{"gateway": {"http": true}}', "gateway.parentRefs: must name"),
        ('{"tls": {"clientAuth": true}}', "tls.existingSecret: tls.clientAuth needs it"),
        (
            '{"apiKeys": {"existingSecret": "a"}, "monitoring": {"serviceMonitor": {"enabled": true}}}',
            "monitoring.serviceMonitor.apiKey.existingSecret: with apiKeys",
        ),
        ('{"workers": {"mode": "ray"}}', "workers.mode: ray needs the KubeRay operator"),
        ('{"decode": {"autoscaling": {"minReplicas": 9}}}', "decode.autoscaling.minReplicas: is above"),
    ],
)
def test_mistakes_are_refused_by_name(sets: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text(sets)
    with pytest.raises(Refused) as caught:
        render("-f", str(tmp_path / "values.yaml"))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("sets", "problem"),
    [
        ('model.servedName="m"', "model.servedName"),
        ("prefill.autoscaling.enabled=true", "prefill.autoscaling.enabled"),
        ('decode.settings={"threads": 2}', "decode.settings"),
    ],
)
def test_what_ray_cannot_do_is_refused(sets: str, problem: str) -> None:
    with pytest.raises(Refused, match=problem):
        render("--set-json", 'workers.mode="ray"', "--set-json", sets, *RAY)


def test_secrets_are_made_unless_they_are_given() -> None:
    made = {one["metadata"]["name"] for one in render() if one["kind"] == "Secret"}
    assert made == {"segue-valkey", "segue-cluster"}
    given = ('valkey.existingSecret="a"', 'clusterSecret.existingSecret="b"')
    assert not [one for one in render(*(word for one in given for word in ("--set-json", one))) if one["kind"] == "Secret"]


def test_no_secret_lies_in_plain_sight() -> None:
    """Passwords are in Secrets alone: not in arguments, nor in variables whose value is written out."""
    for case in CASES:
        objects = render(*case.words)
        secrets = [value for one in objects if one["kind"] == "Secret" for value in one["data"].values()]
        rest = json.dumps([one for one in objects if one["kind"] != "Secret"])
        assert not [value for value in secrets if value in rest]


# A name, the kind and end of the name of the object, a change to it that is a mistake, and the check that must see it.
PLANTED: list[tuple[str, str, str, Any, str]] = [
    ("a typo in a field", "Deployment", "-router", lambda o: o["spec"].update(replica=3), "schema"),
    ("a field of the wrong type", "StatefulSet", "-decode", lambda o: o["spec"].update(replicas="2"), "schema"),
    ("a missing field", "Service", "-prefill", lambda o: o["spec"]["ports"][0].pop("port"), "schema"),
    ("a typo in a pod", "StatefulSet", "-prefill", lambda o: main_container(o).update(readynessProbe={}), "schema"),
    ("a typo in a scaler", "ScaledObject", "-decode", lambda o: o["spec"].update(minReplicas=1), "schema"),
    (
        "a typo in a rule",
        "PrometheusRule",
        "segue",
        lambda o: o["spec"]["groups"][0]["rules"][0].update(expression=""),
        "schema",
    ),
    ("a typo in a monitor", "ServiceMonitor", "segue", lambda o: o["spec"]["endpoints"][0].update(intervall="1s"), "schema"),
    ("a route to nowhere", "HTTPRoute", "segue", lambda o: o["spec"]["rules"][0]["backendRefs"][0].pop("port"), "schema"),
    ("a typo in Ray's cluster", "RayCluster", "segue", lambda o: o["spec"].update(workerGroupSpec=[]), "schema"),
    ("a typo in Ray's pods", "RayCluster", "segue", lambda o: ray_pod(o)["containers"][0].update(imagePullPolice=""), "schema"),
    ("root", "Deployment", "-router", lambda o: pod(o)["securityContext"].update(runAsUser=0), "restricted"),
    ("no seccomp", "Deployment", "-router", lambda o: pod(o)["securityContext"].pop("seccompProfile"), "restricted"),
    (
        "escalation",
        "StatefulSet",
        "-decode",
        lambda o: main_container(o)["securityContext"].pop("allowPrivilegeEscalation"),
        "restricted",
    ),
    (
        "capabilities",
        "StatefulSet",
        "-decode",
        lambda o: main_container(o)["securityContext"].pop("capabilities"),
        "restricted",
    ),
    ("added ones", "StatefulSet", "-decode", lambda o: caps(o).update(add=["SYS_PTRACE"]), "restricted"),
    (
        "a writable root",
        "StatefulSet",
        "-valkey",
        lambda o: main_container(o)["securityContext"].pop("readOnlyRootFilesystem"),
        "restricted",
    ),
    ("the host's network", "RayCluster", "segue", lambda o: ray_pod(o).update(hostNetwork=True), "restricted"),
    (
        "the host's files",
        "Deployment",
        "-router",
        lambda o: pod(o)["volumes"][0].update(emptyDir=None, hostPath={}),
        "restricted",
    ),
    ("a token", "Deployment", "-router", lambda o: pod(o).pop("automountServiceAccountToken"), "restricted"),
    ("no limit", "Deployment", "-router", lambda o: main_container(o)["resources"]["limits"].pop("memory"), "restricted"),
]


def pod(one: Object) -> Object:
    spec: Object = one["spec"]["template"]["spec"]
    return spec


def caps(one: Object) -> Object:
    capabilities: Object = main_container(one)["securityContext"]["capabilities"]
    return capabilities


def ray_pod(one: Object) -> Object:
    spec: Object = one["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    return spec


@pytest.mark.parametrize(
    ("kind", "name", "mistake", "check"), [planted[1:] for planted in PLANTED], ids=[p[0] for p in PLANTED]
)
def test_planted_mistakes_are_seen(kind: str, name: str, mistake: Any, check: str) -> None:
    for case in CASES:
        objects = render(*case.words)
        if any(one["kind"] == kind and one["metadata"]["name"].endswith(name) for one in objects):
            break
    one = pick(objects, kind, name)
    mistake(one)
    if check == "schema":
        errors = list(on_all_minors([one]))
        assert len(errors) >= 3, "one for each minor version"
    else:
        volumes = pod_templates(one)[0]["spec"]["volumes"]
        volumes[0] = {key: value for key, value in volumes[0].items() if value is not None}
        assert len(restricted_errors(one)) >= 1


def test_planted_mistakes_in_networks_are_seen() -> None:
    objects = render()
    pick(objects, "NetworkPolicy", "-workers")["spec"]["ingress"][0].pop("from")
    assert may_connect(objects, OTHER, labels("prefill"), 50061)


def checkov(folder: Path) -> set[str]:
    """Numbers of the policies that something in the folder's files breaks."""
    words = ["-d", str(folder), "--framework", "kubernetes", "--skip-download", "--compact", "--quiet", "-o", "json"]
    done = subprocess.run([CHECKOV, *words], capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 100
    return {found["check_id"] for found in report["results"]["failed_checks"]}


def test_checkov_finds_nothing_that_is_not_explained(tmp_path: Path) -> None:
    planted = render()
    main_container(pick(planted, "Deployment", "-router"))["securityContext"]["privileged"] = True
    # But for helm test's pod, which has no probes.
    sound = [one for case in CASES for one in render(*case.words) if one["kind"] != "Pod"]
    for name, objects in {"sound": sound, "planted": planted}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "all.yaml").write_text(yaml.safe_dump_all(objects))
    assert checkov(tmp_path / "sound") == EXPLAINED.keys()
    assert "CKV_K8S_16" in checkov(tmp_path / "planted"), "a privileged container"
