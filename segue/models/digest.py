"""Content digests of files. Those of large files are kept in the store, so that gigabytes are not read at each start."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from segue.errors import ModelFileError
from segue.paths import models_dir

# Smaller files are hashed faster than their digest is looked up.
_WORTH_KEEPING_BYTES = 2**20


def file_digest(file: Path) -> str:
    """SHA-256 of the file's content, in hexadecimal. Raises ModelFileError when it cannot be read.

    A kept digest counts as long as the file's size, time of change and inode are those it was computed for.
    """
    try:
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        kept_in = models_dir() / ".digests" / f"{hashlib.sha256(os.fsencode(file.resolve())).hexdigest()}.json"
        if (kept := _read_kept(kept_in, stamp)) is not None:
            return kept
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(f"cannot read {file}: {error.strerror}") from None
    if stat.st_size >= _WORTH_KEEPING_BYTES:
        _keep(kept_in, stamp, digest)
    return digest


def _read_kept(kept_in: Path, stamp: list[int]) -> str | None:
    try:
        entry = json.loads(kept_in.read_bytes())
    except (OSError, ValueError):
        return None
    match entry:
        case {"stamp": known, "digest": str(digest)} if known == stamp:
            return digest
    return None


def _keep(kept_in: Path, stamp: list[int], digest: str) -> None:
    unfinished = kept_in.with_suffix(f".{os.getpid()}.partial")
    try:
        kept_in.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps({"stamp": stamp, "digest": digest}))
        unfinished.replace(kept_in)
    except OSError:
        # A store that cannot be written costs time at each start and nothing else.
        return
