"""The Compare view beside Hugging Face transformers, in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.server.serving import Running, wait_for

# The first answer waits for transformers to be imported and for its model.
PATIENCE = 120_000


def test_two_engines_write_the_same(page: Page, server: Running, tmp_path: Path) -> None:
    page.goto(server.url + "#compare")
    page.fill("#compare-tokens", "48")
    page.get_by_role("button", name="Compare", exact=True).click()
    note = page.locator("#compare-note")
    expect(note).to_contain_text("Both texts are equal.", timeout=PATIENCE)
    expect(note).to_contain_text("one after the other, each alone")
    texts = page.locator(".side-text").all_inner_texts()
    assert texts[0] == texts[1] != ""
    figures = page.locator("#compare-figures")
    for row in ("Time to first token", "Time per token after it", "Tokens a second", "Memory"):
        expect(figures).to_contain_text(row)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as JSON").click()
    file = tmp_path / "comparison.json"
    download.value.save_as(file)
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved["mode"] == "one after the other"
    assert saved["first_difference"] is None
    assert [answer["tokens"] for answer in saved["answers"]] == [48, 48]
    assert all(
        answer["measuredBy"] == "engine" and answer["tpot"] > 0 and answer["memory"] for answer in saved["answers"]
    )


def test_both_at_once_and_stop(page: Page, server: Running) -> None:
    page.goto(server.url + "#compare")
    page.fill("#compare-tokens", "900")
    page.select_option("#compare-mode", "together")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#compare-note")).to_contain_text("share the machine")
    expect(page.locator(".side-text").nth(1)).not_to_be_empty(timeout=PATIENCE)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".side").nth(1)).to_contain_text("Stopped")
    expect(page.get_by_role("button", name="Compare", exact=True)).to_be_visible()
    wait_for(lambda: not server.engine.has_unfinished)


def test_where_two_texts_part(page: Page, server: Running) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "Quite another text"}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/flexmoe/compare", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.goto(server.url + "#compare")
    page.fill("#compare-tokens", "8")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#compare-note")).to_contain_text("part at character", timeout=PATIENCE)
    expect(page.locator(".side-text mark")).to_have_count(2)


@pytest.mark.parametrize("view", ["compare"])
def test_without_another_engine_it_says_how_to_get_one(page: Page, server: Running, view: str) -> None:
    about = server.get("/v1/flexmoe/about").json() | {"compare": None}
    page.route("**/v1/flexmoe/about", lambda route: route.fulfill(json=about))
    page.goto(f"{server.url}#{view}")
    page.reload()  # what the server runs with was asked at Chat already
    expect(page.locator("#view-compare")).to_contain_text("flexmoe serve --compare hf")
