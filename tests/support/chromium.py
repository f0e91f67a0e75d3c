"""A headless Chromium for tests: the one of SEGUE_CHROMIUM, of PATH, or that playwright has downloaded before."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from playwright.async_api import Browser, Playwright, async_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Skips the test where there is none."""
    async with async_playwright() as playwright:
        path = _find(playwright)
        if path is None:
            pytest.skip("no Chromium on this machine: install one (Debian: apt install chromium) or set SEGUE_CHROMIUM")
        # Within containers Chromium's own sandbox has no rights; the page is ours.
        async with await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as browser:
            yield browser


def _find(playwright: Playwright) -> str | None:
    if (given := os.environ.get("SEGUE_CHROMIUM")) is not None:
        return given
    found = next((path for path in map(shutil.which, _NAMES) if path is not None), None)
    downloaded = playwright.chromium.executable_path
    return found or (downloaded if Path(downloaded).exists() else None)
