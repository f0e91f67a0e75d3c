"""Looking at a model directory without loading it: is it complete, and which weights are these."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from segue.errors import ModelFileError
from segue.models.config import ModelConfig
from segue.models.digest import file_digest
from segue.models.json_fields import JsonFields
from segue.models.safetensors_file import read_header
from segue.paths import models_dir

INDEX_NAME = "model.safetensors.index.json"
# What engine/calibration.py has measured, in the safetensors format. Other engines take every *.safetensors for weights.
CALIBRATION_NAME = "segue_calibration.st"
_REVISION_HEX_DIGITS = 32


def check_model_dir(path: Path) -> None:
    """Raises ModelFileError naming the file and the problem, unless `path` holds a model that this version can load:
    a supported config.json, a tokenizer.json, and weights whose files are as long as their headers say."""
    if not path.is_dir():
        raise ModelFileError(f"{path} is not a directory")
    ModelConfig.from_dir(path)
    if not JsonFields.read(path / "tokenizer.json").values.get("model"):
        raise ModelFileError(f"{path / 'tokenizer.json'}: has no model; it must be in the format of the tokenizers library")
    held = {file.name: read_header(file).names for file in weight_files(path)}
    for name, file_name in _index(path).items():
        if name not in held[file_name]:
            raise ModelFileError(f"{path / file_name}: lacks the tensor {name}, which {INDEX_NAME} says it holds")


def weight_files(path: Path) -> Sequence[Path]:
    """The safetensors files of the model, sorted: those that the index names where there is one."""
    if index := _index(path):
        files = [path / name for name in sorted(set(index.values()))]
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelFileError(f"{path} holds no .safetensors file; other formats of weights are not supported")
    return files


def model_revision(path: Path) -> str:
    """A fingerprint of the network and its weights: equal for equal content wherever it lies, other for other weights."""
    digest = hashlib.sha256()
    for file in [path / "config.json", *weight_files(path)]:
        digest.update(f"{file.name}\0{file_digest(file)}\0".encode())
    return digest.hexdigest()[:_REVISION_HEX_DIGITS]


def calibration_file(path: Path, revision: str) -> Path:
    """Where the calibration of the model in `path` is, or is to be put: beside a stored model; in the store, by the weights'
    `revision`, for a directory of somebody else, which is only read."""
    beside = path / CALIBRATION_NAME
    if beside.exists() or path.resolve().parent == models_dir().resolve():
        return beside
    return models_dir() / ".calibration" / f"{revision}.safetensors"


def _index(path: Path) -> dict[str, str]:
    """Tensor name to file name; empty where there is no index."""
    if not (path / INDEX_NAME).exists():
        return {}
    fields = JsonFields.read(path / INDEX_NAME)
    index = fields.child("weight_map").values
    # A bare name, since an index must not lead out of its directory.
    if not index or not all(isinstance(name, str) and name == Path(name).name and name for name in index.values()):
        raise fields.error("weight_map", "must map tensor names to names of files in the same directory")
    return dict(index)
