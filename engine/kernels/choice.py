"""Which backend computes."""

from __future__ import annotations

from typing import Any

from engine.kernels.base import Kernels
from engine.kernels.native import NativeKernels, built_library, instruction_sets
from engine.kernels.reference import TorchKernels
from engine.kv_cache import KVCache
from engine.rotary import RotaryTable
from segue.errors import ConfigError
from segue.models.config import ModelConfig


def make_kernels(
    config: ModelConfig, cache: KVCache, rotary: RotaryTable, *, threads: int, device: str = "cpu", kernels: str = "auto"
) -> Kernels[Any, Any]:
    """For the device that holds `cache`.

    On CPUs `kernels` is "torch", an instruction set of the native library, or "auto": the best native one, and torch where the
    library was not built. Raises ConfigError for what this machine cannot run.
    """
    if device == "cuda":
        # Not loaded by workers that compute on CPUs.
        from engine.kernels.triton_backend import TritonKernels

        return TritonKernels(config, cache, rotary)
    library = built_library()
    names = [*instruction_sets(library), "torch"]
    name = names[0] if kernels == "auto" else kernels
    if name not in names:
        raise ConfigError(f"kernels: {kernels} is not there; this machine has: {', '.join(names)}")
    if library is None or name == "torch":
        return TorchKernels(config, cache, rotary)
    return NativeKernels(library, name, config, cache, rotary, threads=threads)
