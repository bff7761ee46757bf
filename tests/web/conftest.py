"""One server and one browser for all tests of the page; each test gets a fresh context, with storage of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

_MISSING = [name for name in ("playwright", "fastapi", "transformers") if importlib.util.find_spec(name) is None]

if _MISSING:
    collect_ignore_glob = ["test_*.py"]
else:
    from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

    from tests.server.serving import Running, running
    from tests.web.browsing import CHROMIUM, FLAGS, PATIENCE

    expect.set_options(timeout=PATIENCE)

    @pytest.fixture(scope="session")
    def server() -> Iterator[Running]:
        with running({"dtype": "float32"}, compare="hf") as server:
            yield server

    @pytest.fixture(scope="session")
    def browser() -> Iterator[Browser]:
        if CHROMIUM is None:
            pytest.skip("needs Chromium, and none is installed; on Debian: apt-get install chromium")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            yield browser
            browser.close()

    @pytest.fixture
    def new_context(browser: Browser) -> Iterator[Any]:
        """Makes contexts: new_context(color_scheme="dark")."""
        made: list[BrowserContext] = []

        def make(**options: Any) -> BrowserContext:
            context = browser.new_context(viewport=options.pop("viewport", {"width": 1100, "height": 800}), **options)
            context.set_default_timeout(PATIENCE)
            made.append(context)
            return context

        yield make
        for context in made:
            context.close()

    @pytest.fixture
    def page(new_context: Any, server: Running) -> Iterator[Page]:
        """The page, open at Chat. Errors of its scripts fail the test."""
        page = new_context().new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("#settings-form .field", state="attached")
        yield page
        assert errors == []
