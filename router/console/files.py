"""The files that the console consists of, by the path they are served at."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "static"


class StaticFile(NamedTuple):
    name: str
    content_type: str


_JAVASCRIPT = "text/javascript"
# Whoever writes a slash at the end is sent on: relative to that, the page's files would be others.
WITH_SLASH = "/console/"
# The page names all others relative to itself, so that a proxy may put the router under any path.
FILES: dict[str, StaticFile] = {
    "/console": StaticFile("console.html", "text/html"),
    "/console/console.css": StaticFile("console.css", "text/css"),
    "/console/icon.svg": StaticFile("icon.svg", "image/svg+xml"),
    **{
        f"/console/{name}.js": StaticFile(f"{name}.js", _JAVASCRIPT)
        for name in ("console", "access", "chart", "chat", "dom", "format", "poll", "requests", "waterfall", "workers")
    },
}
