"""The checks of chart, manifests and image; `make test-deploy` fetches what they need (get_tools.py) and runs them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

TOOLS = Path(sys.prefix) / "deploy-tools"
if not (TOOLS / ".complete").exists():
    raise RuntimeError("the tools of these checks are missing: run make test-deploy")
# Behind everything else.
sys.path.append(str(TOOLS))


@pytest.fixture(scope="session")
def image() -> Iterator[Path]:
    """The files that the image adds to a system, built anew. It takes a minute."""
    from tests.deploy.image import Root

    # More than a gigabyte, which pytest would keep for a while.
    with tempfile.TemporaryDirectory() as folder:
        root = Root(Path(folder))
        root.build()
        # The store is of another image; this one has its program as well, which is linked to where that has it.
        (root.changes / "opt/segue/bin/valkey-server").symlink_to(server_of(root.changes / "opt/segue"))
        yield root.changes


def server_of(venv: Path) -> Path:
    (binary,) = [path for path in venv.rglob("valkey-server") if path.is_file()]
    return Path("/") / binary.relative_to(venv.parents[1])
