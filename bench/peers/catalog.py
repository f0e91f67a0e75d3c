"""Which peers there are, where `setup` puts their parts, and how each is started. A peer with a part missing is not found.

SEGUE_PEERS (default: `peers` in Segue's cache folder)
├── vllm/, llama_cpp/, nixl/, sglang_router/  virtual environments
├── models/                   NAME.gguf, and w8a8/ in Hugging Face layout
└── cache/                    what vLLM compiles
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segue.paths import home

# The files that llama.cpp's quantizer writes, by the names of its formats.
GGUF_FORMATS = ("f32", "q8_0", "q4_0", "q4_1")

_NIXL_DRIVER = Path(__file__).parent / "drivers" / "nixl_pair.py"
# How many tokens of a prompt vLLM computes at once.
VLLM_STEP_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """One peer in one format. `driver` is a module in the folder `drivers`, or on a PYTHONPATH in `env`."""

    name: str
    python: Path
    driver: str
    model: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_there(self) -> bool:
        return venv_stamp(self.python.parent.parent).exists() and self.model.exists()


def peers_dir() -> Path:
    configured = os.environ.get("SEGUE_PEERS")
    return Path(configured).expanduser() if configured else home() / "peers"


def venv_stamp(venv: Path) -> Path:
    """Written when the environment is complete: what it holds, one requirement a line."""
    return venv / "segue-complete.txt"


def venv_python(venv: Path) -> Path:
    return venv / "bin" / "python"


def float_dir(folder: Path) -> Path:
    return folder / "models" / "f32"


def w8a8_dir(folder: Path) -> Path:
    return folder / "models" / "w8a8"


def gguf_file(folder: Path, gguf_format: str) -> Path:
    return folder / "models" / f"{gguf_format}.gguf"


def find_peers(folder: Path | None = None) -> list[PeerSpec]:
    """The peers that `setup` has completed in `folder`, `peers_dir()` if None."""
    return [spec for spec in all_peers(folder or peers_dir()) if spec.is_there]


def find_nixl() -> list[str] | None:
    """The command that starts NIXL's driver; None where `setup` has not installed NIXL."""
    venv = peers_dir() / "nixl"
    return [str(venv_python(venv)), str(_NIXL_DRIVER)] if venv_stamp(venv).exists() else None


def all_peers(folder: Path) -> list[PeerSpec]:
    vllm_python, llama_python = venv_python(folder / "vllm"), venv_python(folder / "llama_cpp")
    env = _vllm_env(folder)
    options = {"dtype": "float32", "step_tokens": VLLM_STEP_TOKENS}
    vllm = [
        PeerSpec("vllm_f32", vllm_python, "vllm_driver", float_dir(folder), options, env),
        PeerSpec("vllm_w8a8", vllm_python, "vllm_driver", w8a8_dir(folder), options, env),
    ]
    llama_cpp = [
        PeerSpec(f"llama_cpp_{name}", llama_python, "llama_cpp_driver", gguf_file(folder, name)) for name in GGUF_FORMATS
    ]
    return vllm + llama_cpp


def _vllm_env(folder: Path) -> dict[str, str]:
    return {
        # The engine in the driver's own process: a step can be timed, and nothing runs between steps.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # GiB; 64 sequences of 1,024 tokens in float32 take 3.
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache" / "inductor"),
        # Compiled in the driver itself, not in a pool of helpers that stays.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
