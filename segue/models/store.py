"""The model store: finds models by any of their names, and fetches or imports those that are not there yet.

A stored model is a folder in Hugging Face layout below `segue.paths.models_dir()`. It appears there by one rename,
complete, and is never changed afterwards; all that may join it is the file that engine/calibration.py makes from it. A lock for
each name lets one process fetch it while others wait and then find it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from segue.config import DEFAULT_MODEL
from segue.errors import ModelFileError
from segue.models.default_model import download_default_gguf
from segue.models.digest import file_digest
from segue.models.gguf_import import Progress, import_gguf
from segue.models.hub import download_from_hub, is_hub_id
from segue.models.model_dir import check_model_dir, model_revision
from segue.paths import models_dir

__all__ = ["ModelHandle", "check_model_dir", "import_model", "list_models", "model_revision", "pull_default", "resolve"]

# In an imported model's folder: which file it came from.
SOURCE_NAME = "segue_source.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, slots=True)
class ModelHandle:
    """`path` is a checked directory in Hugging Face layout; `revision` changes whenever its weights do."""

    name: str
    path: Path
    revision: str


def resolve(model: str, progress: Progress | None = None) -> ModelHandle:
    """The model that `model` names: a directory, a .gguf file, a stored model, the default model, or a Hub id `org/name`.

    What is missing is fetched. Raises ModelFileError saying what is wrong and what to do next.
    """
    report = progress or _silent
    path = Path(model).expanduser()
    # An empty name would be the working directory.
    if model and path.is_dir():
        return _handle(path.resolve().name, path.resolve())
    if path.suffix == ".gguf" or path.is_file():
        return import_model(path, progress=report)
    if _NAME.fullmatch(model) and (stored := models_dir() / model).is_dir():
        return _handle(model, stored)
    if model == DEFAULT_MODEL:
        return pull_default(report)
    if is_hub_id(model):
        report(f"fetching {model} from the Hub", 0.0)
        return _handle(model, download_from_hub(model))
    names = ", ".join(handle.name for handle in list_models()) or "none"
    raise ModelFileError(
        f"no model {model!r}: it is no directory, no .gguf file and none of the stored models ({names}); "
        f"give one of these, a Hub id (org/name), or {DEFAULT_MODEL}, which is fetched by itself"
    )


def pull_default(progress: Progress | None = None) -> ModelHandle:
    """Fetches the default model unless a sound copy is stored; replaces a damaged one."""
    report = progress or _silent
    with _new_folder(DEFAULT_MODEL, report) as scratch:
        destination = models_dir() / DEFAULT_MODEL
        if destination.is_dir():
            try:
                return _handle(DEFAULT_MODEL, destination)
            except ModelFileError:
                report(f"the stored {DEFAULT_MODEL} is damaged, fetching it again", 0.0)
        file = download_default_gguf(scratch, report)
        _import_file(file, scratch / DEFAULT_MODEL, file_digest(file), report)
        if destination.is_dir():
            # Moved away, not removed in place: whoever still reads it keeps its files.
            destination.rename(scratch / "damaged")
        (scratch / DEFAULT_MODEL).rename(destination)
        return _handle(DEFAULT_MODEL, destination)


def import_model(source: Path, name: str | None = None, progress: Progress | None = None) -> ModelHandle:
    """Takes a .gguf file, or a directory in Hugging Face layout, into the store.

    Without a `name`, a .gguf file whose content is stored already, under any name, is that model. Raises ModelFileError when
    another model has the name.
    """
    report = progress or _silent
    if name is not None and not _NAME.fullmatch(name):
        raise ModelFileError(f"{name!r} cannot be a model's name: use letters, digits, dots, dashes and underscores")
    if source.is_dir():
        check_model_dir(source)
        name = name or _slug(source.resolve().name)
        with _new_folder(name, report) as scratch:
            return _store_copy(source, scratch / name, report)
    report(f"reading {source.name}", 0.0)
    digest = file_digest(source)
    if name is None and (stored := _stored_from(digest)) is not None:
        return _handle(stored.name, stored)
    name = name or f"{_slug(source.stem)}-{digest[:8]}"
    with _new_folder(name, report) as scratch:
        destination = models_dir() / name
        if not destination.is_dir():
            _import_file(source, scratch / name, digest, report)
            (scratch / name).rename(destination)
        elif _source_digest(destination) != digest:
            raise _name_taken(destination)
        return _handle(name, destination)


def list_models() -> list[ModelHandle]:
    """The sound models of the store, by name."""
    handles = []
    for path in _stored_paths():
        with contextlib.suppress(ModelFileError):
            handles.append(_handle(path.name, path))
    return handles


def list_damaged() -> list[ModelFileError]:
    """What is wrong with each of the others."""
    errors = []
    for path in _stored_paths():
        try:
            check_model_dir(path)
        except ModelFileError as error:
            errors.append(error)
    return errors


def _silent(_message: str, _share: float) -> None:
    return


def _handle(name: str, path: Path) -> ModelHandle:
    check_model_dir(path)
    return ModelHandle(name, path, model_revision(path))


def _stored_paths() -> list[Path]:
    return [path for path in sorted(models_dir().glob("*")) if _NAME.fullmatch(path.name) and path.is_dir()]


def _stored_from(digest: str) -> Path | None:
    return next((path for path in _stored_paths() if _source_digest(path) == digest), None)


def _source_digest(path: Path) -> str | None:
    """Digest of the file that the stored model was imported from; None for one that was copied."""
    try:
        source = json.loads((path / SOURCE_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return source.get("sha256") if isinstance(source, dict) else None


def _import_file(file: Path, destination: Path, digest: str, report: Progress) -> None:
    import_gguf(file, destination, report)
    (destination / SOURCE_NAME).write_text(json.dumps({"file": file.name, "sha256": digest}) + "\n")


def _store_copy(source: Path, copy: Path, report: Progress) -> ModelHandle:
    destination = models_dir() / copy.name
    if destination.is_dir():
        if model_revision(destination) != model_revision(source):
            raise _name_taken(destination)
        return _handle(destination.name, destination)
    report(f"copying {source}", 0.0)
    try:
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".*"))
        copy.rename(destination)
    except (OSError, shutil.Error) as error:
        raise ModelFileError(f"cannot copy {source} to {destination}: {error}") from None
    return _handle(destination.name, destination)


def _name_taken(destination: Path) -> ModelFileError:
    return ModelFileError(f"another model is stored as {destination.name}; choose another name, or remove {destination}")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:96].lower() or "model"


@contextlib.contextmanager
def _new_folder(name: str, report: Progress) -> Iterator[Path]:
    """An empty folder on the store's disk to prepare the model `name` in, and the right to store it: one process at a time.

    What an interrupted process left there is removed. The kernel frees the lock of a process that dies.
    """
    lock_file, scratch = models_dir() / ".locks" / name, models_dir() / ".scratch" / name
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        with lock_file.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(f"waiting for another process that fetches {name}", 0.0)
                fcntl.flock(lock, fcntl.LOCK_EX)
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise ModelFileError(
            f"cannot write the model store {models_dir()}: {error}; set SEGUE_HOME to another folder"
        ) from error
