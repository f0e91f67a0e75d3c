"""A worker refuses what it could not do, before it loads anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.valkey import embedded_valkey
from deploy.worker import serving_worker
from segue.config import WorkerSettings
from segue.errors import ConfigError
from tests.support.tiny_model import make_tiny_model


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("settings", "problem"),
    [({"device": "cuda"}, "device: torch finds no CUDA device"), ({"kv_memory": 1}, "kv_memory: 1 bytes hold")],
)
async def test_what_this_machine_has_not_is_refused(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    async with embedded_valkey(tmp_path / "valkey.log") as valkey:
        worker = WorkerSettings(
            cluster_id="c",
            redis=valkey.url,
            worker_id="decode-0",
            roles=("decode",),
            model_dir=make_tiny_model(tmp_path / "tiny"),
            model_name="m",
            **settings,
        )
        with pytest.raises(ConfigError, match=problem):
            async with serving_worker(worker):
                pass
