"""A worker refuses what it could not do, before it loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.valkey import embedded_valkey
from deploy.worker import serving_worker
from segue.config import WorkerSettings
from segue.errors import ConfigError


async def test_a_gpu_worker_of_one_role_is_refused(tmp_path: Path) -> None:
    async with embedded_valkey(tmp_path / "valkey.log") as valkey:
        settings = WorkerSettings(
            cluster_id="c",
            redis=valkey.url,
            worker_id="decode-0",
            roles=("decode",),
            model_dir=tmp_path,
            model_name="m",
            device="cuda",
        )
        with pytest.raises(ConfigError, match="--colocated"):
            async with serving_worker(settings):
                pass
