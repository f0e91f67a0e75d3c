"""What a measurement depends on beside the code: the machine, and which code it was."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# Instruction sets that decide which kernels run.
_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16")
Fact = str | int | float | list[str]


def machine_facts(cpuinfo: Path = Path("/proc/cpuinfo"), meminfo: Path = Path("/proc/meminfo")) -> dict[str, Fact]:
    """The two files are where Linux tells about processor and memory; elsewhere these facts are left as unknown."""
    cpu, memory = _first_fields(cpuinfo), _first_fields(meminfo)
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": _num_usable_cores(),
        "memory_gib": round(int(memory.get("MemTotal", "0 kB").split()[0]) / 2**20, 1),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": _version("torch"),
    }


def commit(folder: Path = Path(__file__).parent) -> str:
    """The commit that the code is at, with `-dirty` for changes on top; `unknown` outside a checkout."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _first_fields(file: Path) -> Mapping[str, str]:
    """`name : value` lines; of a name that comes again, the first value."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _num_usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
