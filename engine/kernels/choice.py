"""Which backend computes."""

from __future__ import annotations

from typing import Any

from engine.kernels.base import Kernels
from engine.kernels.native import NativeKernels, instruction_sets
from engine.kernels.reference import TorchKernels
from engine.kv_cache import KVCache
from engine.rotary import RotaryTable
from segue.errors import ConfigError
from segue.models.config import ModelConfig


def make_kernels(
    config: ModelConfig, cache: KVCache, rotary: RotaryTable, *, threads: int, device: str = "cpu", kernels: str = "auto"
) -> Kernels[Any, Any]:
    """`kernels` is "torch", an instruction set of the native library, or "auto": the best native one, and torch where the
    library was not built. Raises ConfigError for what this machine cannot run."""
    if device != "cpu":
        raise ConfigError(f"device: only cpu is supported, not {device}")
    names = instruction_sets()
    if kernels == "torch" or (kernels == "auto" and not names):
        return TorchKernels(config, cache, rotary)
    if kernels not in {"auto", *names}:
        raise ConfigError(f"kernels: {kernels} is not there; this machine has: {', '.join(['torch', *names])}")
    return NativeKernels(config, cache, rotary, threads=threads, instruction_set=None if kernels == "auto" else kernels)
