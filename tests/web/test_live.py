"""Experts and Engine while the server works, and what the page does when the server goes away."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, expect

from flexmoe.config.routing import read_recording
from tests.server.serving import Process, Running, wait_for
from tests.web.browsing import PATIENCE, keep_busy, say, set_sampling, wait_for_answer

_MAP = "document.querySelector('canvas.heat').toDataURL()"


def test_the_map_of_experts_moves_under_load(page: Page, server: Running, tmp_path: Path) -> None:
    page.goto(server.url + "#experts")
    page.wait_for_selector("canvas.heat")
    seen = page.evaluate(_MAP)  # before the load, which a quick machine ends within the first looks
    keep_busy(page)
    expect(page.locator("#view-experts tbody tr")).to_have_count(6, timeout=PATIENCE)
    page.wait_for_function(f"seen => {_MAP} !== seen", arg=seen, timeout=PATIENCE)
    page.get_by_role("button", name="Pause").click()
    page.wait_for_timeout(200)
    still = page.evaluate(_MAP)
    looks = server.service.engine.experts.looks
    wait_for(lambda: server.service.engine.experts.looks > looks or not server.engine.has_unfinished)
    assert page.evaluate(_MAP) == still
    page.locator("canvas.heat").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".heat-told")).to_contain_text("Layer 0, expert 1:")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download recording").click()
    file = tmp_path / "routing.jsonl"
    download.value.save_as(file)
    loads = read_recording(file)
    assert [load.layer for load in loads] == list(range(6))
    assert all(sum(load.counts) == load.top_k * load.tokens > 0 for load in loads)
    wait_for(lambda: not server.engine.has_unfinished)


def test_ranks_and_their_loads(page: Page, server: Running) -> None:
    about: dict[str, Any] = server.get("/v1/flexmoe/about").json()
    about["experts"]["placements"] = [[[0, 2, 4, 6, 7], [1, 3, 5, 7]]] * 6
    page.route("**/v1/flexmoe/about", lambda route: route.fulfill(json=about))
    page.goto(server.url + "#experts")
    page.reload()  # what the server runs with was asked at Chat already
    keep_busy(page, 2)
    expect(page.locator("#view-experts")).to_contain_text("spread over 2 ranks", timeout=PATIENCE)
    expect(page.locator("#view-experts thead")).to_contain_text("Rank 1", timeout=PATIENCE)
    wait_for(lambda: not server.engine.has_unfinished)


def test_the_engine_s_figures(page: Page, server: Running) -> None:
    page.goto(server.url + "#engine")
    keep_busy(page)
    cards = page.locator(".cards")
    expect(cards).to_contain_text("3 samples", timeout=PATIENCE)
    for name in ("Running", "Waiting", "KV blocks in use", "prefix cache", "Speed"):
        expect(cards).to_contain_text(name)
    expect(page.locator(".chart canvas")).to_have_count(4)
    for fact in ("Decode steps", "plan", "one rank", "kv cache blocks"):
        expect(page.locator("#view-engine")).to_contain_text(fact)
    wait_for(lambda: not server.engine.has_unfinished)


def test_a_server_that_goes_away_and_comes_back(new_context: Any) -> None:
    first = Process()
    page = new_context().new_page()
    try:
        page.goto(first.url)
        status = page.locator("#status")
        expect(status).to_have_text("Connected", timeout=PATIENCE)
        first.signal(signal.SIGTERM)
        expect(status).to_contain_text("away", timeout=PATIENCE)
        assert first.wait() == 0
    finally:
        first.end()
    say(page, "Are you there?")
    expect(page.locator("[role=alert]")).to_contain_text("cannot be reached", timeout=PATIENCE)
    second = Process("--port", first.url.rpartition(":")[2])
    try:
        expect(status).to_have_text("Connected", timeout=PATIENCE)
        set_sampling(page, max_tokens=4)
        page.get_by_role("button", name="Regenerate").click()
        expect(wait_for_answer(page).locator(".stats")).to_contain_text("tokens")
    finally:
        second.end()
