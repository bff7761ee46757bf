"""How the page looks, loads and reads: themes, a phone's screen, axe, weight, first paint, headers."""

from __future__ import annotations

from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from tests.server.serving import Running
from tests.web.browsing import fake_answer, say, wait_for_answer

VIEWS = ("chat", "compare", "experts", "engine")
READY = {
    "chat": "#settings-form .field",
    "compare": "#compare-prompt",
    "experts": "canvas.heat",
    "engine": ".chart canvas",
}
MARKDOWN = (
    "# Title\n\nText with `code` and a [link](https://example.org).\n\n```py\nx = 1\n```\n\n"
    "| a | b |\n|---|---|\n| 1 | 2 |\n"
)


@pytest.mark.parametrize("width", [1100, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_and_nothing_hangs_over(
    new_context: Any, server: Running, scheme: str, width: int
) -> None:
    page = new_context(color_scheme=scheme, viewport={"width": width, "height": 800}).new_page()
    for view in VIEWS:
        page.goto(f"{server.url}#{view}")
        page.wait_for_selector(READY[view], state="attached")
        if view == "chat":
            fake_answer(page, [MARKDOWN])
            say(page, "Show me something")
            wait_for_answer(page)
            page.click("#settings summary")
        assert _serious(page) == [], view
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
        assert page.evaluate("document.documentElement.scrollHeight <= innerHeight"), view  # its view scrolls instead


def _serious(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {violation['nodes'][0]['html']}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]


def test_light_and_dark_follow_the_system_until_a_switch(new_context: Any, server: Running) -> None:
    page = new_context(color_scheme="dark").new_page()
    page.goto(server.url)
    assert _back(page) == "rgb(21, 24, 26)"
    page.get_by_role("button", name="Theme").click()
    assert _back(page) == "rgb(251, 250, 247)"
    page.reload()
    assert _back(page) == "rgb(251, 250, 247)"
    page.get_by_role("button", name="Theme").click()
    assert _back(page) == "rgb(21, 24, 26)"


def _back(page: Page) -> str:
    color: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return color


def test_on_a_phone_the_conversations_fold(new_context: Any, server: Running) -> None:
    page = new_context(viewport={"width": 390, "height": 780}).new_page()
    page.goto(server.url)
    page.wait_for_selector("#settings-form .field", state="attached")
    expect(page.locator("#conversations")).not_to_be_visible()
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#conversations")).not_to_be_visible()
    expect(page.locator("#prompt")).to_be_visible()


def test_it_is_light_quick_and_needs_nobody_else(new_context: Any, server: Running) -> None:
    page = new_context().new_page()
    sizes: dict[str, int] = {}
    page.on("response", lambda response: sizes.update({response.url: len(_body(response))}))
    page.goto(server.url)
    page.wait_for_selector("#settings-form .field", state="attached")
    for view in VIEWS:
        page.goto(f"{server.url}#{view}")
        page.wait_for_selector(READY[view], state="attached")
    assert all(url.startswith(server.url) for url in sizes)
    assert sum(sizes.values()) < 500_000
    assert any(_first_paint(new_context, server) < 1000 for _ in range(5)), "nor while other programs leave it alone"


def _first_paint(new_context: Any, server: Running) -> float:
    """Milliseconds of a page that knows nothing yet."""
    page = new_context().new_page()
    page.goto(server.url)
    page.wait_for_selector("#settings-form .field", state="attached")
    found: float = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
    return found


def _body(response: Any) -> bytes:
    return b"" if "/v1/" in response.url else response.body()


def test_headers(server: Running) -> None:
    for path in ("/", "/static/app.js", "/static/vendor/marked.js"):
        headers = server.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
    assert server.get("/static/nothing.js").status_code == 404
    assert server.get("/static/../app.py").status_code == 404


def test_the_page_of_the_interface_needs_no_network(new_context: Any, server: Running) -> None:
    context = new_context()
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.goto(f"{server.url}/docs")
    expect(page.locator(".opblock-summary-path", has_text="/v1/completions")).to_be_visible()
    assert [url for url in asked if not url.startswith((server.url, "data:"))] == []
