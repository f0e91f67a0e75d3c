"""The kernels' library with its AVX-512 code compiled for emulated intrinsics, so that it runs on any processor with AVX2."""

from __future__ import annotations

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engine.kernels
from engine.kernels.native import open_library

SOURCES = Path(engine.kernels.__file__).parent / "csrc"
# As the library itself is built, but quicker to compile; every processor feature is said to be there.
_COMPILE = ("g++", "-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-w", "-D__builtin_cpu_supports(name)=1")
_INCLUDE = (f"-I{SOURCES}", f"-I{Path(__file__).parent}")
_TARGET = '#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl'


def build_emulated_library(directory: Path) -> ctypes.CDLL:
    with ThreadPoolExecutor() as executor:
        objects = list(executor.map(lambda source: _compile(source, directory), sorted(SOURCES.glob("*.cpp"))))
    library = directory / "emulated.so"
    subprocess.run(["g++", "-shared", "-pthread", *objects, "-o", library], check=True)
    return open_library(str(library))


def _compile(source: Path, directory: Path) -> Path:
    text = source.read_text()
    if source.stem.startswith("avx512"):
        assert text.count(_TARGET) == 1
        emulated = '#pragma GCC target("avx2,fma,f16c")\n#include "avx512_emulated.h"\n//'
        text = text.replace(_TARGET, emulated)
    copy = directory / source.name
    copy.write_text(text)
    subprocess.run([*_COMPILE, *_INCLUDE, "-c", copy, "-o", copy.with_suffix(".o")], check=True)
    return copy.with_suffix(".o")
