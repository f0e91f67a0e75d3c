"""deploy/ray/cluster.yaml is one that `ray up` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

FILE = Path(__file__).parents[3] / "deploy" / "ray" / "cluster.yaml"


def check(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(config)
    validate_config(prepared)
    return prepared


def test_ray_accepts_it() -> None:
    prepared = check(yaml.safe_load(FILE.read_text()))
    types = prepared["available_node_types"]
    assert types["prefill"]["resources"]["prefill_node"] == types["decode"]["resources"]["decode_node"] == 1
    assert all("RAY_AUTH_MODE=token" in prepared[f"{side}_start_ray_commands"][1] for side in ("head", "worker"))


@pytest.mark.parametrize("planted", [{"head_node_type": "nothing"}, {"max_wrokers": 3}, {"max_workers": "many"}])
def test_ray_finds_a_planted_mistake(planted: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=str(next(iter(planted)))[:8]):
        check(yaml.safe_load(FILE.read_text()) | planted)
