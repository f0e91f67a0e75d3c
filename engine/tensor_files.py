"""The safetensors files of a model directory, one or several, read through memory maps."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from segue.errors import ModelFileError
from segue.models.json_fields import JsonFields

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class TensorFiles:
    """Raises ModelFileError for files that are missing or damaged."""

    def __init__(self, model_dir: Path) -> None:
        self._model_dir = model_dir
        single, index = model_dir / SINGLE_FILE, model_dir / INDEX_FILE
        is_indexed = index.exists() and not single.exists()
        self._open = {file: _open(file) for file in (_indexed_files(index) if is_indexed else [single])}
        self._file_of: dict[str, Path] = {}
        for file, opened in self._open.items():
            self._file_of |= dict.fromkeys(opened.keys(), file)

    @property
    def names(self) -> Set[str]:
        return self._file_of.keys()

    def file_of(self, name: str) -> Path:
        """The file that holds the tensor; raises ModelFileError when none does."""
        if name not in self._file_of:
            where = self._model_dir if len(self._open) > 1 else next(iter(self._open))
            raise ModelFileError(f"{where}: tensor {name} is missing; the file is incomplete or config.json is another model's")
        return self._file_of[name]

    def read(self, name: str) -> torch.Tensor:
        """The tensor, as a view of the mapped file."""
        file = self.file_of(name)
        try:
            tensor: torch.Tensor = self._open[file].get_tensor(name)
        except SafetensorError as error:
            raise ModelFileError(f"{file}: cannot read tensor {name}: {error}") from None
        return tensor


def _indexed_files(index: Path) -> list[Path]:
    weight_map = JsonFields.read(index).child("weight_map")
    if not weight_map.values:
        raise ModelFileError(f"{index}: weight_map: is empty")
    names = {weight_map.get(tensor) for tensor in weight_map.values}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelFileError(f"{index}: weight_map: {name!r} is not the name of a .safetensors file beside it")
    return [index.parent / str(name) for name in sorted(names)]


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except OSError as error:
        raise ModelFileError(f"cannot read {file}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ModelFileError(f"{file} is damaged or incomplete: {error}; fetch or import the model again") from None
