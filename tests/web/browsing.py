"""Chromium for tests, and answers that no model would give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import Any

from playwright.sync_api import Page, expect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PATIENCE = 45_000  # ms; the machine may be busy

# Answers a chat with these pieces in place of the server, 16 together as soon as can be; those beyond `held` wait for
# window.goOn().
_FAKE = """([pieces, held]) => {
  const released = new Promise((resolve) => { window.goOn = resolve; });
  const real = window.fetch;
  window.fetch = (path, options) => {
    if (!String(path).includes("chat/completions")) return real(path, options);
    const body = new ReadableStream({
      async start(out) {
        let sent = 0;
        const write = (data) => out.enqueue(new TextEncoder().encode(`data: ${data}\\n\\n`));
        for (const content of pieces) {
          if (sent === held) await released;
          if (++sent % 16 === 0) await new Promise((resolve) => setTimeout(resolve, 0));
          write(JSON.stringify({ choices: [{ index: 0, delta: { content }, finish_reason: null }] }));
        }
        write(JSON.stringify({ choices: [{ index: 0, delta: {}, finish_reason: "stop" }] }));
        write("[DONE]");
        out.close();
      },
    });
    return Promise.resolve(new Response(body, { status: 200 }));
  };
}"""


def fake_answer(page: Page, pieces: Sequence[str], held: int | None = None) -> None:
    """From now on the page's chats are answered with these pieces of text, all but the first `held` after `go_on`."""
    page.evaluate(_FAKE, [list(pieces), held])


def go_on(page: Page) -> None:
    """Let a held answer come to its end."""
    page.evaluate("window.goOn()")


def say(page: Page, text: str) -> None:
    """Send a message."""
    page.fill("#prompt", text)
    page.click("#send", no_wait_after=True)  # no page follows, and the server may be gone


def wait_for_answer(page: Page, number: int = 0) -> Any:
    """The last answer, once it is complete. number: of answers that stand before it."""
    answer = page.locator(".turn.assistant").nth(number)
    expect(answer.get_by_role("button", name="Regenerate")).to_be_visible(timeout=PATIENCE)
    return answer


def set_sampling(page: Page, **values: Any) -> None:
    """Fill in the sampling controls."""
    if page.locator("#settings").get_attribute("open") is None:
        page.click("#settings summary")
    for name, value in values.items():
        page.fill(f"#set-{name}" if name != "system" else "#system", str(value))


def keep_busy(page: Page, count: int = 3, tokens: int = 700) -> None:
    """Let the server write stories; what becomes of them is of no interest."""
    body = json.dumps({"prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True})
    page.evaluate(
        """([body, count]) => { window.busy = Array.from({length: count}, () => fetch("/v1/completions",
          { method: "POST", headers: { "Content-Type": "application/json" }, body })); }""",
        [body, count],
    )
