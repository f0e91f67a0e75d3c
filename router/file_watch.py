"""Follows files that are replaced while a router runs: API keys and certificates."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from segue.errors import ConfigError

logger = logging.getLogger(__name__)

# One look costs some microseconds, works on every file system, and follows the links that Kubernetes turns over.
LOOK_S = 1.0

Stamp = tuple[tuple[int, int, int] | None, ...]


def stamp_of(files: Sequence[Path]) -> Stamp:
    """Differs whenever one of the files was written or replaced."""
    return tuple(_stamp(file) for file in files)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


async def follow(files: Sequence[Path], reload: Callable[[], None], last: Stamp, look_s: float = LOOK_S) -> None:
    """Calls `reload` when a file is no longer as in `last`; runs until cancelled. What cannot be read is logged, and what was
    read before stays."""
    while True:
        await asyncio.sleep(look_s)
        now = stamp_of(files)
        if now == last:
            continue
        last = now
        try:
            reload()
        except ConfigError as error:
            logger.error("going on with what was read before: %s", error.message)
        else:
            logger.info("read %s again", ", ".join(map(str, files)))
