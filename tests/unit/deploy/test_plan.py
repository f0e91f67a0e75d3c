"""What a cluster consists of."""

import json
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.driver_plan import DriverPlan
from deploy.plan import can_listen, check_model, check_settings, is_spread, plan_driver, plan_router, plan_workers, worker_names
from segue.config import ClusterSettings, WorkerSettings
from segue.errors import ConfigError
from segue.models.store import ModelHandle

MODEL = ModelHandle("tiny", Path("/models/tiny"), "r1")


def workers_of(cluster: ClusterSettings, num_cores: int = 8) -> list[WorkerSettings]:
    return plan_workers(cluster, cluster_id="c", redis="redis://r", model=MODEL, num_cores=num_cores)


def test_workers_are_named_for_their_role() -> None:
    assert worker_names(ClusterSettings(prefill=2)) == {
        "prefill-0": ("prefill",),
        "prefill-1": ("prefill",),
        "decode-0": ("decode",),
    }
    assert worker_names(ClusterSettings(colocated=True, decode=2)) == {
        "worker-0": ("prefill", "decode"),
        "worker-1": ("prefill", "decode"),
    }


def test_every_worker_gets_the_engine_settings_of_the_cluster() -> None:
    cluster = ClusterSettings(dtype="bfloat16", kv_memory="64MiB", block_size=32, max_batch=3, kv_transport="tcp")  # type: ignore[arg-type]
    for worker in workers_of(cluster):
        assert (worker.dtype, worker.kv_memory, worker.block_size) == ("bfloat16", 64 * 2**20, 32)
        assert (worker.max_batch, worker.kv_transport) == (3, "tcp")
        assert (worker.model_dir, worker.model_name, worker.redis) == (MODEL.path, "tiny", "redis://r")


@settings(max_examples=50)
@given(num_cores=st.integers(1, 128), prefill=st.integers(1, 64), decode=st.integers(1, 64), decode_tp=st.integers(1, 8))
def test_cores_are_shared_out_and_never_promised_twice(num_cores: int, prefill: int, decode: int, decode_tp: int) -> None:
    workers = workers_of(ClusterSettings(prefill=prefill, decode=decode, decode_tp=decode_tp), num_cores)
    threads = [worker.threads for worker in workers for _ in range(worker.num_ranks)]
    assert len(set(threads)) == 1
    assert threads[0] >= 1
    assert sum(threads) <= max(num_cores, len(threads))
    assert (threads[0] + 1) * len(threads) > num_cores  # no core that could be shared out is left


def test_threads_that_were_asked_for_are_given() -> None:
    assert [worker.threads for worker in workers_of(ClusterSettings(threads=5), num_cores=2)] == [5, 5]


def test_on_a_ray_cluster_the_node_decides_on_the_threads() -> None:
    assert workers_of(ClusterSettings(ray_address="head:6379", redis="redis://r"))[0].threads == 0


@pytest.mark.parametrize(
    ("address", "spread"),
    [(None, False), ("127.0.0.1:6379", False), ("localhost:6379", False), ("head:6379", True), ("auto", True)],
)
def test_workers_land_elsewhere_only_on_a_ray_elsewhere(address: str | None, spread: bool) -> None:
    assert is_spread(ClusterSettings(ray_address=address)) is spread


def test_workers_elsewhere_need_a_store_that_they_can_reach() -> None:
    with pytest.raises(ConfigError, match="--redis"):
        check_settings(ClusterSettings(ray_address="head:6379", http_port=0, grpc_port=0))
    check_settings(ClusterSettings(ray_address="head:6379", redis="redis://r", http_port=0, grpc_port=0))


@pytest.mark.parametrize("flag", ["http_port", "grpc_port"])
def test_a_taken_port_is_found_before_anything_is_started(flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert not can_listen("127.0.0.1", port)
        with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')}") as caught:
            check_settings(ClusterSettings(**({"http_port": 0, "grpc_port": 0} | {flag: port})))
    assert caught.value.field == flag
    assert can_listen("127.0.0.1", port)


def test_numbers_of_ranks_that_cannot_be_are_found_before_anything_is_started(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    config |= {"intermediate_size": 1536, "num_hidden_layers": 1, "vocab_size": 9, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    model = ModelHandle("tiny", tmp_path, "r1")
    check_model(ClusterSettings(prefill_tp=3, decode_tp=1), model)
    with pytest.raises(ConfigError, match=r"decode_tp: 2 ranks cannot share 9 heads, 3 kv heads .* takes 1, 3") as caught:
        check_model(ClusterSettings(decode_tp=2), model)
    assert caught.value.field == "decode_tp"
    with pytest.raises(ConfigError, match="the same ranks"):
        check_settings(ClusterSettings(colocated=True, prefill_tp=2, http_port=0, grpc_port=0))
    check_settings(ClusterSettings(colocated=True, prefill_tp=2, decode_tp=2, http_port=0, grpc_port=0))


def test_the_router_gets_its_part() -> None:
    cluster = ClusterSettings(host="0.0.0.0", http_port=1, grpc_port=2)
    router = plan_router(cluster, cluster_id="c", redis="redis://r", model=MODEL)
    assert (router.host, router.http_port, router.grpc_port) == ("0.0.0.0", 1, 2)
    assert (router.cluster_id, router.model_dir, router.model_name) == ("c", MODEL.path, "tiny")


def test_the_drivers_plan_survives_the_way_to_its_process() -> None:
    cluster = ClusterSettings(prefill=2)
    workers = workers_of(cluster)
    plan = plan_driver(cluster, workers, cluster_id="c", entry="module:function").with_temp_dir("/somewhere")
    again = DriverPlan.from_json(plan.to_json())
    assert again == plan
    assert [WorkerSettings.model_validate_json(text) for text in again.workers] == workers


def test_logs_and_traces_are_alike_everywhere() -> None:
    told = {"log_format": "json", "otlp_endpoint": "http://c:4318", "trace_ratio": 0.25}
    cluster = ClusterSettings.model_validate(told)
    router = plan_router(cluster, cluster_id="c", redis="redis://r", model=MODEL)
    for process in (router, *workers_of(cluster)):
        assert {name: getattr(process, name) for name in told} == told
