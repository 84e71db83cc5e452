"""A real browser: the system's Chromium, driven by playwright. None of its own is ever downloaded."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from paths import ROOT
from playwright.sync_api import Browser, Page, sync_playwright

SHOTS = ROOT / "browser-shots"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 240_000.0
"""Milliseconds that a wait may take: machines are busy, and a test fails for what is wrong."""


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.fail(f"no browser: these tests need one of {', '.join(NAMES)} (apt-get install chromium), or its path in BROWSER_PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Browser) -> Callable[..., object]:
    """Opens an address in a window of its own; on leaving, the console must have had no errors. Without ``network`` every request is refused."""

    @contextmanager
    def window(address: str, *, width: int = 1400, scheme: str = "light", network: bool = True) -> Iterator[Page]:
        context = browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme, offline=not network)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        errors: list[str] = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("requestfailed", lambda request: errors.append(f"failed: {request.url}"))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        yield page
        assert not errors
        if not network:
            assert [url for url in asked if not url.startswith(("data:", "blob:"))] == [address], "the page asks for nothing but itself"
        context.close()

    return window


@pytest.fixture(scope="session")
def shots() -> Path:
    """Where pictures go, which are compared with nothing and looked at."""
    SHOTS.mkdir(exist_ok=True)
    return SHOTS
