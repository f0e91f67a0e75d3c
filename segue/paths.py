"""Where Segue keeps files: SEGUE_HOME, or the XDG cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    if configured := os.environ.get("SEGUE_HOME"):
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "segue"


def models_dir() -> Path:
    return home() / "models"


def logs_dir() -> Path:
    return home() / "logs"
