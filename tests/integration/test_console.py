"""The web console in a real Chromium: over a real cluster, and over a scripted front that asks for keys."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from playwright.async_api import Browser, Page, expect

from deploy.valkey import Valkey
from router.fake import FakeOperator, FakeSequenceServer, token_steps
from router.front import Front
from router.text import Tokenizer
from segue.api_keys import create_key
from segue.config import RouterSettings
from tests.support.chromium import chromium
from tests.support.cluster import in_process_cluster
from tests.support.tiny_model import make_tiny_model

# Where to leave pictures of the page, for people to look at.
SHOTS = os.environ.get("SEGUE_CONSOLE_SHOTS")
WIDTHS = {"narrow": 390, "wide": 1400}
LIMIT_MS = 30_000


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as running:
        expect.set_options(timeout=LIMIT_MS)
        yield running


class Watched:
    """A page, and whatever went wrong in it."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.problems: list[str] = []
        self.asked: set[str] = set()
        page.on("console", lambda message: self._note(f"{message.type}: {message.text}", message.type in {"error", "warning"}))
        page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        page.on("requestfailed", lambda request: self.problems.append(f"failed: {request.url}"))
        page.on("response", lambda answer: self._note(f"{answer.status}: {answer.url}", answer.status >= 400))
        page.on("request", lambda request: self.asked.add(request.url.split("/")[2]))

    def _note(self, text: str, is_problem: bool) -> None:
        if is_problem:
            self.problems.append(text)


async def ask(page: Page, text: str, max_tokens: int) -> None:
    await page.locator("#max-tokens").fill(str(max_tokens))
    await page.locator("#temperature").fill("0")
    await page.locator("#prompt").fill(text)
    await page.locator("#prompt").press("Enter")


async def assert_nothing_is_cut_off(page: Page) -> None:
    """No part of the page is wider than the window."""
    too_wide = await page.evaluate(
        """() => [...document.querySelectorAll("body, section, .card, figure, form, #waterfall-body > *")]
             .filter((node) => node.scrollWidth > node.clientWidth + 1 || node.getBoundingClientRect().right > innerWidth + 1)
             .map((node) => node.id || node.className || node.tagName)"""
    )
    assert too_wide == []


async def test_the_console_of_a_real_cluster(browser: Browser, model_dir: Path, valkey: Valkey) -> None:
    async with in_process_cluster(valkey.url, model_dir, decode=2) as cluster:
        address = cluster.front.http_address
        page = await browser.new_page()
        watched = Watched(page)
        await page.goto(f"http://{address}/console")
        await expect(page.locator("#connection")).to_have_text("live")
        await expect(page.locator("#prefill-pool .card .name")).to_have_text("prefill-0ready")
        await expect(page.locator("#decode-pool .card")).to_have_count(2)
        await expect(page.locator("#ready")).to_have_text("3 of 3")
        await expect(page.locator("#no-requests")).to_be_visible()

        # An answer grows piece by piece, and its waterfall is there while it runs.
        await ask(page, "Hello " + "there " * 10, 150)
        answer = page.locator("#messages li").nth(1)
        await expect(answer.locator(".text")).not_to_have_text("")
        await expect(answer.locator("button")).to_have_count(1)
        request_id = await answer.locator("button").get_attribute("title")
        await expect(page.locator("#waterfall-id")).to_have_text(str(request_id))
        await expect(page.locator("#waterfall-body .stage").last).to_have_text("decode")
        await expect(answer).to_have_attribute("aria-busy", "false")
        await expect(answer.locator(".about")).to_contain_text("first text after")
        chosen = page.locator("#request-rows tr[aria-selected=true]")
        await expect(chosen).to_contain_text("ok")
        await expect(chosen).to_contain_text("prefill-0 → decode-")
        await expect(page.locator("#waterfall-body")).to_contain_text("prefill-0 → decode-")
        await expect(page.locator("#flows path")).to_have_count(1)
        await expect(page.locator("#ttft-readout")).to_contain_text("p99")
        await expect(page.locator("#inter-token-chart .p50")).to_have_count(1)

        # What the model says and what the user types is text, whatever it looks like; a conversation goes on.
        await ask(page, "<img src=x onerror=alert(1)>", 2)
        await expect(page.locator("#messages li")).to_have_count(4)
        await expect(page.locator("#messages li").nth(2)).to_contain_text("<img src=x")
        await expect(page.locator("#messages li").nth(3)).to_have_attribute("aria-busy", "false")
        await expect(page.locator("#request-rows tr")).to_have_count(2)
        await page.locator("#request-rows button").last.click()
        await expect(page.locator("#waterfall-id")).to_have_text(str(request_id))

        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            for name, width in WIDTHS.items():
                await page.set_viewport_size({"width": width, "height": 900})
                await assert_nothing_is_cut_off(page)
                if SHOTS:
                    await page.screenshot(path=Path(SHOTS) / f"{scheme}-{name}.png", full_page=True)
        assert watched.problems == []
        assert watched.asked == {address}
        await page.close()


async def test_keys_a_lost_router_and_a_stopped_answer(browser: Browser, model_dir: Path, tmp_path: Path) -> None:
    """Over a scripted core: every answer takes for ever after its first tokens."""
    keys = tmp_path / "keys.json"
    key = create_key(keys, "ann", permissions=("infer", "observe"))
    tokenizer = Tokenizer.from_dir(model_dir)
    settings = RouterSettings(
        cluster_id="test",
        redis="unused",
        model_dir=model_dir,
        model_name="tiny",
        http_port=0,
        grpc_port=0,
        drain_s=1,
        api_keys_file=keys,
    )
    config: Any = SimpleNamespace(max_context=512, vocab_size=tokenizer.num_token_ids, eos_token_ids=(2,), bos_token_id=None)
    core = FakeSequenceServer(lambda request: [*token_steps(tokenizer.encode("so far"), None), asyncio.Event()])
    page = await browser.new_page()
    async with Front(settings, tokenizer, config, core, FakeOperator()) as front:
        await page.goto(f"http://{front.http_address}/console")
        await expect(page.locator("#key-dialog")).to_be_visible()
        await expect(page.locator("#key-problem")).to_contain_text("needs an API key")
        await page.locator("#key").fill("segue_wrong")
        await page.locator("#key").press("Enter")
        await expect(page.locator("#key-problem")).to_contain_text("not known")
        await page.locator("#key").fill(key)
        await page.locator("#key").press("Enter")
        await expect(page.locator("#connection")).to_have_text("live")
        await expect(page.locator("#key-dialog")).to_be_hidden()
        stored = json.loads(await page.evaluate("JSON.stringify([localStorage.length, Object.values(sessionStorage)])"))
        assert stored == [0, [key]]

        await ask(page, "Hello", 50)
        answer = page.locator("#messages li").nth(1)
        await expect(answer.locator(".text")).to_have_text("so far")
        await expect(page.locator("#request-rows .outcome")).to_have_text("running")
        await page.locator("#stop").click()
        await expect(answer.locator(".about")).to_contain_text("stopped")
        await core.until(lambda core: len(core.cancelled) == 1)
        await expect(page.locator("#request-rows .outcome")).to_have_text("cancelled")

        await page.locator("#key-button").click()
        await expect(page.locator("#key-dialog")).to_be_visible()
        assert await page.evaluate("sessionStorage.length") == 0
        await page.locator("#key").fill(key)
        await page.locator("#key").press("Enter")
        await expect(page.locator("#connection")).to_have_text("live")
    await expect(page.locator("#connection")).to_have_attribute("data-state", "disconnected")
    await expect(page.locator("#connection")).to_contain_text("cannot be reached, last heard")
    await page.close()
