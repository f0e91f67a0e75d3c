"""One-time import of a GGUF file into a Hugging Face directory, the only model format that the rest of Segue reads.

    open and check the header → config and tokenizer → weights, tensor by tensor → check the result → rename into place

All is written into a temporary folder beside the destination. Whatever interrupts the import, the destination is either absent
or complete.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segue.errors import ModelFileError
from segue.models.config import ModelConfig
from segue.models.gguf_file import GgufFile
from segue.models.gguf_network import Weight, network_config, network_weights
from segue.models.gguf_tokenizer import build_tokenizer, special_tokens, tokenizer_config
from segue.models.safetensors_file import Float32Writer

# Says what is being done and which share of it is done, 0 to 1.
Progress = Callable[[str, float], None]

WEIGHTS_NAME = "model.safetensors"


def import_gguf(file: Path, destination: Path, progress: Progress | None = None) -> None:
    """Writes the model of `file` into the new directory `destination`.

    Raises ModelFileError when the file is damaged or unsupported, when `destination` exists or cannot be written.
    """
    report = progress or (lambda _message, _share: None)
    report(f"reading {file.name}", 0.0)
    source = GgufFile(file)
    config = network_config(source)
    weights = network_weights(source, config)
    tokenizer = build_tokenizer(source)
    if destination.exists():
        raise ModelFileError(f"{destination} exists already; remove it or import under another name")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=partial_prefix(destination)) as folder:
            # mkdtemp closes its folder to all but the owner; the model is meant to be read like any other file.
            unfinished = Path(folder) / destination.name
            unfinished.mkdir()
            _write_texts(source, config, unfinished)
            tokenizer.save(str(unfinished / "tokenizer.json"))
            _check_config(source, unfinished)
            _write_weights(source, weights, unfinished / WEIGHTS_NAME, report)
            unfinished.rename(destination)
    except OSError as error:
        raise ModelFileError(f"cannot write {destination}: {error.strerror or error}") from error


def partial_prefix(destination: Path) -> str:
    """How the names of the temporary folders begin that an import into `destination` makes beside it."""
    return f".{destination.name}.partial-"


def _check_config(source: GgufFile, folder: Path) -> None:
    """What the engine refuses of the written config.json is the GGUF file's fault, and said of it."""
    try:
        ModelConfig.from_dir(folder)
    except ModelFileError as error:
        problem = error.message.removeprefix(f"{folder / 'config.json'}: ")
        raise source.error(f"the network that it describes is not supported: {problem}", error.field) from None


def _write_texts(source: GgufFile, config: dict[str, Any], folder: Path) -> None:
    specials = special_tokens(source)
    ids: dict[str, Any] = {"bos_token_id": specials.bos, "eos_token_id": specials.eos[0]}
    if specials.padding is not None:
        ids["pad_token_id"] = specials.padding
    generation = ids | {"eos_token_id": specials.eos[0] if len(specials.eos) == 1 else list(specials.eos)}
    texts = {
        "config.json": config | ids,
        "generation_config.json": generation,
        "tokenizer_config.json": tokenizer_config(source, config["max_position_embeddings"]),
    }
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(source: GgufFile, weights: list[Weight], path: Path, report: Progress) -> None:
    writer = Float32Writer(path, [(weight.name, weight.shape) for weight in weights])
    free = shutil.disk_usage(path.parent).free
    if writer.num_bytes > free:
        raise ModelFileError(
            f"{path.parent.parent.parent} has {free >> 20} MiB free, the imported model needs {writer.num_bytes >> 20} MiB; "
            "free some space or set SEGUE_HOME to a larger disk"
        )
    with writer:
        for index, weight in enumerate(weights):
            report(f"importing {source.path.name}", index / len(weights))
            writer.write(source.read_chunks(weight.source, weight.row_order))
    report(f"importing {source.path.name}", 1.0)
