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


async def test_a_worker_listens_at_the_ports_that_it_is_given(tmp_path: Path) -> None:
    async with embedded_valkey(tmp_path / "valkey.log") as valkey:
        settings = WorkerSettings(
            cluster_id="c",
            redis=valkey.url,
            worker_id="decode-0",
            roles=("decode",),
            model_dir=make_tiny_model(tmp_path / "tiny"),
            model_name="m",
            kv_memory=2**20,
            threads=1,
        )
        async with serving_worker(settings) as first:
            grpc_port, kv_port = (int(place.rpartition(":")[2]) for place in (first.address, first.kv_ends[0].endpoint))
            for field, port in {"grpc_port": grpc_port, "kv_port": kv_port}.items():
                with pytest.raises(ConfigError, match=f"{field}: .*{port}"):
                    async with serving_worker(settings.model_copy(update={field: port})):
                        pass
            with pytest.raises(ConfigError, match=f"health_port: .*{grpc_port}"):
                async with serving_worker(settings.model_copy(update={"health_port": grpc_port})):
                    pass
        ports = {"grpc_port": grpc_port, "kv_port": kv_port}
        async with serving_worker(settings.model_copy(update=ports)) as second:
            assert second.address == f"127.0.0.1:{grpc_port}"
            assert second.kv_ends[0].endpoint == f"tcp://127.0.0.1:{kv_port}"
