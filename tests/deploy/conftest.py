"""The checks of chart, manifests and image; `make test-deploy` fetches what they need (get_tools.py) and runs them."""

from __future__ import annotations

import sys
from pathlib import Path

TOOLS = Path(sys.prefix) / "deploy-tools"
if not (TOOLS / ".complete").exists():
    raise RuntimeError("the tools of these checks are missing: run make test-deploy")
# Behind everything else.
sys.path.append(str(TOOLS))
