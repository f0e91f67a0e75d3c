"""The built wheel holds what a checkout holds: a package without __init__.py would be missing from it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("segue", "engine", "kv_transfer", "prefill_worker", "decode_worker", "router", "deploy", "bench")
# Builds in a folder of its own: setuptools would leave build/ and *.egg-info in the checkout.
BUILD = """
import os, sys
source, destination = sys.argv[1:]
os.chdir(source)
from setuptools import build_meta
print(build_meta.build_wheel(destination))
"""


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    source, destination = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", *PACKAGES):
        if (ROOT / name).exists():
            (source / name).symlink_to(ROOT / name)
    subprocess.run(
        [sys.executable, "-c", BUILD, str(source), str(destination)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
        # Kernels take long to compile, and a package must come about without them as well.
        env=os.environ | {"CC": "false", "CXX": "false"},
    )
    (wheel,) = destination.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_of_the_checkout_is_in_the_wheel(package: str, wheel_names: set[str]) -> None:
    wanted = {
        str(path.relative_to(ROOT))
        for suffix in ("py", "pyi", "typed", "txt", "html", "css", "js", "svg")
        for path in (ROOT / package).rglob(f"*.{suffix}")
        # The chart is Helm's, not Python's.
        if "helm" not in path.parts
    }
    assert wanted
    assert not sorted(wanted - wheel_names)


def test_nothing_but_packages_is_in_the_wheel(wheel_names: set[str]) -> None:
    others = {name.split("/")[0] for name in wheel_names} - set(PACKAGES)
    assert [name.endswith(".dist-info") for name in others] == [True]
