from pathlib import Path

import pytest

from segue.config import ClusterSettings, EngineSettings, RouterSettings, WorkerSettings, parse_bytes
from segue.errors import ConfigError


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "segue.toml"
    file.write_text('prefill = 2\ndecode = 3\ndtype = "bfloat16"\n')
    settings = ClusterSettings.load(flags={"prefill": 5, "decode": None}, env={"SEGUE_DECODE": "4"}, file=file)
    assert (settings.prefill, settings.decode, settings.dtype, settings.http_port) == (5, 4, "bfloat16", 8000)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("1", 1), ("2k", 2048), ("1.5GiB", 1_610_612_736), ("512 MiB", 2**29), ("3mb", 3 * 2**20)]
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"prefill": 0}, "prefill"),
        ({"http_port": 70000}, "http_port"),
        ({"dtype": "int4"}, "dtype"),
        ({"kv_memory": "lots"}, "kv_memory"),
        ({"prefil": 1}, "prefil"),
        ({"prefill": "two", "decode": "three"}, "decode"),
    ],
)
def test_a_bad_setting_is_named(flags: dict[str, object], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        ClusterSettings.load(flags=flags, env={})


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        ClusterSettings.load(env={}, file=tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("prefill = = 2")
    with pytest.raises(ConfigError, match="not valid TOML"):
        ClusterSettings.load(env={}, file=tmp_path / "bad.toml")


def test_settings_reach_a_child_through_its_environment() -> None:
    worker = WorkerSettings(
        cluster_id="c",
        redis="redis://:secret@127.0.0.1:1/0",
        worker_id="both-0",
        roles=("prefill", "decode"),
        model_dir=Path("/models/m"),
        model_name="m",
        threads=2,
        keep_float=("head", "down"),
        decode_quantization="int4",
    )
    assert WorkerSettings.load(env=worker.to_env()) == worker
    router = RouterSettings(cluster_id="c", redis="redis://r", model_dir=Path("/m"), model_name="m", http_port=0)
    assert RouterSettings.load(env=router.to_env()) == router


def test_workers_that_only_decode_may_hold_their_weights_otherwise() -> None:
    def own(roles: str, **settings: object) -> str:
        fields = {"cluster_id": "c", "redis": "r", "worker_id": "w", "model_dir": Path("/m"), "model_name": "m"}
        return WorkerSettings.load(flags=fields | {"roles": roles} | settings, env={}).own_quantization

    assert [own(roles, quantization="int8") for roles in ("prefill", "decode", "prefill,decode")] == ["int8"] * 3
    both = {"quantization": "int8", "decode_quantization": "int4"}
    assert [own(roles, **both) for roles in ("prefill", "decode", "prefill,decode")] == ["int8", "int4", "int8"]
    assert own("decode", quantization="int8", decode_quantization="none") == "none"


def test_workers_that_only_decode_may_cut_and_store_their_kv_otherwise() -> None:
    fields = {"cluster_id": "c", "redis": "r", "worker_id": "w", "model_dir": Path("/m"), "model_name": "m"}
    others = {"decode_block_size": 8, "decode_kv_dtype": "int8", "kv_wire": "bfloat16"}

    def own(roles: str, **settings: object) -> tuple[int, str]:
        kv = WorkerSettings.load(flags=fields | {"roles": roles} | settings, env={}).own_kv
        return kv.block_size, kv.kv_dtype

    assert own("decode", block_size=16) == (16, "auto")
    assert [own(roles, **others) for roles in ("prefill", "decode", "prefill,decode")] == [
        (32, "auto"),
        (8, "int8"),
        (32, "auto"),
    ]


def test_weights_name_what_makes_kv_differ() -> None:
    assert EngineSettings().weights == "float32"
    assert EngineSettings(keep_float=("head",)).weights == "float32"
    assert EngineSettings(dtype="bfloat16", quantization="int8").weights == "bfloat16 int8/int8"
    mixed = EngineSettings(quantization="int8", decode_quantization="int4", keep_float=("head", "down"))
    assert mixed.weights == "float32 int8/int4 but down,head"
