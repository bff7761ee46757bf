"""The Chat view against the real server: answers, stop, edit, settings, what is kept, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, Route, expect

from tests.server.serving import Running, wait_for
from tests.web.browsing import PATIENCE, fake_answer, say, set_sampling, wait_for_answer

QUESTION = "What is the capital of Norway?"
ANSWER = "The capital of Norway is Oslo."


def test_a_chat(page: Page, server: Running) -> None:
    expect(page.locator("#status")).to_have_text("Connected", timeout=PATIENCE)
    set_sampling(page, temperature=0)
    say(page, QUESTION)
    answer = wait_for_answer(page)
    expect(answer.locator(".body")).to_have_text(ANSWER)
    expect(answer.locator(".stats")).to_contain_text("tokens/s")
    expect(answer.locator(".stats")).to_contain_text("first token after")
    expect(page.locator("#announcer")).to_contain_text("End of the answer")
    say(page, "And of France?")
    wait_for_answer(page, 1)
    expect(page.locator(".turn")).to_have_count(4)
    wait_for(lambda: not server.engine.has_unfinished)


def test_who_answers_is_told_until_something_is_asked(page: Page) -> None:
    welcome = page.locator("#welcome")
    expect(welcome).to_have_text(
        "“builtin” answers here. Tick “Experts of each token” to see which experts were behind each word."
    )
    say(page, "What is the capital of Norway?")
    expect(welcome).to_be_hidden()
    wait_for_answer(page)
    page.get_by_role("button", name="New conversation").click()
    expect(welcome).to_be_visible()


def test_stop_ends_the_answer_here_and_in_the_engine(page: Page, server: Running) -> None:
    set_sampling(page, temperature=1.5, max_tokens=900)
    page.route("**/chat/completions", _endless)
    say(page, "Tell me a long story.")
    expect(page.locator(".turn.assistant .body")).not_to_be_empty(timeout=PATIENCE)
    page.click("#stop")
    answer = wait_for_answer(page)
    expect(answer.locator(".stats")).to_contain_text("stopped by you")
    expect(page.locator("#send")).to_be_visible()
    wait_for(lambda: not server.engine.has_unfinished)


def _endless(route: Route) -> None:
    route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))


def test_edit_and_regenerate_replace_what_follows(page: Page) -> None:
    fake_answer(page, ["first"])
    say(page, "one")
    wait_for_answer(page)
    fake_answer(page, ["second"])
    page.get_by_role("button", name="Regenerate").click()
    expect(wait_for_answer(page).locator(".body")).to_have_text("second")
    fake_answer(page, ["third"])
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit your message").fill("two")
    page.get_by_role("button", name="Send again").click()
    expect(wait_for_answer(page).locator(".body")).to_have_text("third")
    expect(page.locator(".turn.user .body")).to_have_text("two")
    expect(page.locator(".turn")).to_have_count(2)


def test_system_prompt_and_sampling_are_asked_for(page: Page) -> None:
    set_sampling(page, system="Be brief.", temperature=0, top_k=5, max_tokens=3, seed=7)
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "Hi")
    body: dict[str, Any] = sent.value.post_data_json
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert [body[name] for name in ("temperature", "top_k", "max_tokens", "seed")] == [0, 5, 3, 7]
    answer = wait_for_answer(page)
    expect(answer.locator(".stats")).to_contain_text("3 tokens")
    expect(answer.locator(".stats")).to_contain_text("cut at the limit of tokens")


def test_conversations_are_kept_exported_and_imported(page: Page, tmp_path: Path) -> None:
    fake_answer(page, ["An *answer*."])
    say(page, "Remember me")
    wait_for_answer(page)
    page.reload()
    expect(page.locator(".turn.assistant .body em")).to_have_text("answer")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / "conversations.json"
    download.value.save_as(file)
    page.get_by_role("button", name="Delete Remember me").click()
    expect(page.locator("#conversation-list li")).to_have_count(0)
    page.set_input_files("#import-file", file)
    page.get_by_role("button", name="Remember me", exact=True).click()
    expect(page.locator(".turn.user .body")).to_have_text("Remember me")


def test_errors_are_sentences(page: Page) -> None:
    set_sampling(page, temperature=-1)
    say(page, "Hi")
    problem = page.locator(".turn.assistant [role=alert]")
    expect(problem).to_have_text("Temperature=-1.0 is not a number from 0 to 100.", timeout=PATIENCE)
    page.route("**/chat/completions", lambda route: route.abort())
    page.get_by_role("button", name="Regenerate").click()
    expect(problem).to_contain_text("The server cannot be reached", timeout=PATIENCE)


def test_a_key_is_asked_for_and_kept_in_the_tab(page: Page) -> None:
    refusal = {"error": {"message": "the API key is missing or wrong", "type": "authentication_error"}}

    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.continue_(headers={**route.request.headers, "authorization": ""})
        else:
            route.fulfill(status=401, json=refusal)

    page.route("**/v1/**", guard)
    set_sampling(page, temperature=0)
    say(page, QUESTION)
    page.fill("#key", "sesame")
    page.get_by_role("button", name="Use it").click()
    expect(wait_for_answer(page).locator(".body")).to_have_text(ANSWER)
    assert page.evaluate("sessionStorage.getItem('flexmoe.key')") == "sesame"
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")


def test_experts_of_a_token(page: Page, server: Running) -> None:
    set_sampling(page, temperature=0)
    page.check("#want-routing")
    say(page, QUESTION)
    answer = wait_for_answer(page)
    answer.get_by_role("button", name="Experts of tokens").click()
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "return_routing": True}
    routing = server.post("/v1/chat/completions", body).json()["choices"][0]["routing"]
    tokens = answer.get_by_role("option")
    expect(tokens).to_have_count(len(routing["tokens"]))
    tokens.nth(1).hover()
    assert _shown(page) == routing["tokens"][1]["experts"]
    tokens.nth(1).focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(2)).to_be_focused()
    assert _shown(page) == routing["tokens"][2]["experts"]
    expect(page.locator(".experts-of-token .chip").first).to_contain_text("%")


def _shown(page: Page) -> list[list[int]]:
    rows = page.locator(".experts-of-token tr").all()
    return [[int(chip.split()[0]) for chip in row.locator(".chip").all_inner_texts()] for row in rows]
