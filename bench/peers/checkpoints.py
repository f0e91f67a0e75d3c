"""The checkpoints that vLLM reads: the float weights as they are, and W8A8.

W8A8 is vLLM's format for int8 arithmetic, compressed-tensors' `int-quantized`: each linear layer's weight becomes int8,
symmetric, with one scale for each output channel (`NAME.weight_scale`, [out, 1]); activations get one scale for each token as
they come. Norms, embeddings and the output head stay float.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

WEIGHTS = "model.safetensors"
_PROJECTIONS = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))
_CONFIG = "config.json"
_INT8_MAX = 127

Array = npt.NDArray[Any]


def quantize_rows(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """`weight` [out, in] → (int8 [out, in], scales [out, 1]); their product is off by half a scale at most."""
    scales = np.abs(weight).max(axis=1, keepdims=True) / np.float32(_INT8_MAX)
    scales[scales == 0] = 1  # a row of zeros stays one
    return np.rint(weight / scales).astype(np.int8), scales.astype(np.float32)


def quantize_tensors(tensors: dict[str, Array]) -> dict[str, Array]:
    quantized: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if name.endswith(_PROJECTIONS):
            quantized[name], quantized[f"{name}_scale"] = quantize_rows(tensor.astype(np.float32))
        else:
            quantized[name] = tensor
    return quantized


def quantization_config() -> dict[str, Any]:
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**int8, "strategy": "channel", "dynamic": False},
                "input_activations": {**int8, "strategy": "token", "dynamic": True},
            }
        },
    }


def link_float(source: Path, destination: Path) -> None:
    """A new folder of links to the model's own files: vLLM reads every .safetensors file that it finds, and others may lie
    beside a stored model's weights."""
    destination.mkdir(parents=True)
    for file in (source / WEIGHTS, *source.glob("*.json")):
        (destination / file.name).symlink_to(file.resolve())


def write_w8a8(source: Path, destination: Path) -> None:
    """`source` is a model in Hugging Face layout with float weights in one file; `destination` is a new folder."""
    destination.mkdir(parents=True)
    for file in source.glob("*.json"):
        shutil.copy(file, destination)
    config = json.loads((source / _CONFIG).read_text())
    config["quantization_config"] = quantization_config()
    (destination / _CONFIG).write_text(json.dumps(config, indent=2))
    save_file(quantize_tensors(load_file(source / WEIGHTS)), destination / WEIGHTS, metadata={"format": "pt"})
