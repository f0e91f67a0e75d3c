"""Which GPU each rank of a worker sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy.worker_process import gpu_env
from segue.config import WorkerSettings
from segue.errors import ConfigError


def worker(**settings: Any) -> WorkerSettings:
    common = {
        "cluster_id": "c",
        "redis": "unused",
        "worker_id": "d",
        "roles": ("decode",),
        "model_dir": Path(),
        "model_name": "m",
    }
    return WorkerSettings(**common, **settings)


@pytest.mark.parametrize(
    ("settings", "visible", "seen"),
    [
        ({"device": "cpu", "decode_tp": 2}, "4,7", [None, None]),
        ({"device": "cuda"}, "4,7", [None]),
        ({"device": "cuda", "decode_tp": 2}, "4,7,9", ["4", "7"]),
        ({"device": "cuda", "decode_tp": 2}, "", ["0", "1"]),
    ],
)
def test_each_of_several_ranks_has_a_gpu_of_its_own(settings: dict[str, Any], visible: str, seen: list[str | None]) -> None:
    env = {"CUDA_VISIBLE_DEVICES": visible}
    ranks = range(len(seen))
    assert [gpu_env(worker(**settings), rank, env).get("CUDA_VISIBLE_DEVICES") for rank in ranks] == seen


def test_too_few_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="decode_tp: 2 ranks need as many GPUs"):
        gpu_env(worker(device="cuda", decode_tp=2), 1, {"CUDA_VISIBLE_DEVICES": "3"})
