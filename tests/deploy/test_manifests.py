"""The plain manifests for those without Helm."""

from __future__ import annotations

import subprocess

import yaml

from tests.deploy.charts import BIN
from tests.deploy.manifests import FOLDER, MANIFESTS, rendered
from tests.deploy.policies import restricted_errors
from tests.deploy.schemas import on_all_minors


def test_they_are_what_the_chart_renders() -> None:
    assert MANIFESTS.read_text() == rendered(), "run: make manifests"


def test_they_hold_no_secret() -> None:
    assert not [one for one in yaml.safe_load_all(MANIFESTS.read_text()) if one["kind"] == "Secret"]


def test_kustomize_takes_them() -> None:
    built = subprocess.run([BIN / "kubectl", "kustomize", FOLDER], capture_output=True, text=True, check=True).stdout
    objects = list(yaml.safe_load_all(built))
    assert len(objects) == sum(1 for _ in yaml.safe_load_all(MANIFESTS.read_text()))
    assert {one["metadata"]["namespace"] for one in objects} == {"segue"}
    assert list(on_all_minors(objects)) == []
    assert [error for one in objects for error in restricted_errors(one)] == []
