"""Mixed load on a server for long: no error, no leak, no lost request.

    python benchmarks/soak.py [--minutes 30] [--clients 48] [--aborts 1000] [--model FOLDER] [--out rows.jsonl]

Clients ask without a pause, more of them than the server computes at once: plain and streamed completions, chats,
batches of prompts, several samples, wrong requests, and streams that their client leaves. Each request has an id. In
the end every id must stand in the server's log exactly once, with the outcome that its client saw; nothing may be
queued, every block must be free, memory where it was after the first fifth, and the server must end with status 0.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
from harness.record import ROOT, append, facts
from harness.server import ServerProcess

BUILTIN = ROOT / "src" / "flexmoe" / "assets" / "builtin"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
WORDS = "once upon a time the old king and his daughter went to the sea where ships of many lands were lying".split()
LEFT = "left"  # the outcome of a stream that its client did not read to the end
GROWTH = 2**26  # bytes of memory that a soak may add
WARM = 100  # requests until everything was used once


@dataclass
class Soak:
    """What is known of all requests so far. outcomes: by id, a status or LEFT."""

    url: str
    end: float
    aborts: int
    seed: int = 0
    outcomes: dict[str, int | str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    numbers: Any = field(default_factory=itertools.count)
    num_left: int = 0

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.end or self.num_left < self.aborts


async def client(soak: Soak, number: int) -> None:
    """Ask one request after the other."""
    rng = random.Random(f"{soak.seed}/{number}")
    async with httpx.AsyncClient(base_url=soak.url, timeout=120) as http:
        while soak.goes_on:
            name = f"soak-{next(soak.numbers)}"
            path, body, leave = request_of(rng)
            try:
                outcome = await ask(http, name, path, body, leave)
                soak.outcomes[name] = outcome
                soak.num_left += outcome == LEFT
            except (httpx.HTTPError, ValueError, KeyError) as error:
                soak.broken.append(f"{name} {path}: {error!r}")


def request_of(rng: random.Random) -> tuple[str, dict[str, Any], bool]:
    """A path, a body, and whether the client leaves before the end."""
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))
    body: dict[str, Any] = {"max_tokens": rng.randint(1, 48), "temperature": rng.choice([0.0, 0.7]), "seed": 1}
    kind = rng.choices(["plain", "stream", "batch", "chat", "samples", "wrong", "leave"], [4, 5, 2, 4, 2, 1, 2])[0]
    if kind == "chat":
        messages = [{"role": "user", "content": text}]
        return CHAT, {**body, "messages": messages, "stream": rng.random() < 0.5}, False
    if kind == "leave":
        return COMPLETIONS, {**body, "prompt": text, "max_tokens": 400, "ignore_eos": True, "stream": True}, True
    more: dict[str, dict[str, Any]] = {
        "plain": {"prompt": text, "logprobs": 1},
        "stream": {"prompt": text, "stream": True, "stop": ["king"]},
        "batch": {"prompt": [text, text[:20] or "a", "b"]},
        "samples": {"prompt": text, "n": 3, "temperature": 1.0, "stream": rng.random() < 0.5},
        "wrong": {"prompt": text, "max_tokens": -1},
    }
    return COMPLETIONS, body | more[kind], False


async def ask(http: httpx.AsyncClient, name: str, path: str, body: dict[str, Any], leave: bool) -> int | str:
    """The outcome. Raises ValueError for an answer that is not whole."""
    async with http.stream("POST", path, json=body, headers={"X-Request-Id": name}) as response:
        if leave and response.status_code == 200:
            async for _ in response.aiter_bytes():
                return LEFT  # which closes the connection
        content = (await response.aread()).decode()
    if response.status_code == 200 and body.get("stream") and not content.endswith("data: [DONE]\n\n"):
        raise ValueError(f"the stream ends with {content[-80:]!r}")
    if response.status_code == 200 and '"error"' in content:
        raise ValueError(content[-200:])
    if response.status_code == 200 and not body.get("stream"):
        expected = body.get("n", 1) * (len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1)
        if len(json.loads(content)["choices"]) != expected:
            raise ValueError(f"{expected} choices were asked for: {content[:200]}")
    if response.status_code == 429:
        await asyncio.sleep(float(response.headers["retry-after"]) / 10)
    return response.status_code


async def run(soak: Soak, clients: int, server: ServerProcess, seconds: float) -> int:
    """All clients at once; the memory after the first fifth of the time, and a hundred requests at least."""
    tasks = [asyncio.create_task(client(soak, number)) for number in range(clients)]
    await asyncio.sleep(seconds / 5)
    while len(soak.outcomes) < WARM and not all(task.done() for task in tasks):
        await asyncio.sleep(0.1)
    memory = server.memory
    await asyncio.gather(*tasks)
    return memory


def complaints(soak: Soak, log: list[dict[str, Any]], metrics: str, grown: int, status: int) -> list[str]:
    """Everything that is not as it should be."""
    found = list(soak.broken)
    seen: dict[str, list[int | str]] = {}
    for line in log:
        if str(line.get("id", "")).startswith("soak-"):
            seen.setdefault(line["id"], []).append(line["status"])
        if line["level"] in ("error", "critical"):
            found.append(f"the log: {line['message']}")
    for name, outcome in soak.outcomes.items():
        told = seen.pop(name, [])
        if len(told) != 1 or (told[0] != outcome and outcome != LEFT):
            found.append(f"{name}: its client saw {outcome}, the log says {told}")
    found += [f"{name} is in the log only: {told}" for name, told in seen.items() if not soak.broken]
    found += [f"status {s}" for s in soak.outcomes.values() if isinstance(s, int) and s not in (200, 400, 429)]
    for name in ("requests_running", "requests_waiting", "kv_cache_usage_ratio"):
        value = re.search(rf"^flexmoe_{name}{{.*}} (.*)$", metrics, re.MULTILINE)
        if value is None or float(value[1]) != 0:
            found.append(f"{name} is {value and value[1]} when nobody asks any more")
    if grown > GROWTH:
        found.append(f"memory grew by {grown >> 20} MiB")
    return found if status == 0 else [*found, f"the server ended with status {status}"]


def settled(url: str) -> str:
    """The metrics, once nothing runs any more; after some seconds as they are."""
    for _ in range(100):
        text = httpx.get(url + "/metrics", timeout=30).text
        if re.search(r"^flexmoe_requests_running{.*} 0.0$", text, re.MULTILINE):
            break
        time.sleep(0.1)
    return text


def main(arguments: list[str] | None = None) -> int:
    """0 if all is well."""
    parser = argparse.ArgumentParser(description="Soak a server.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=48)
    parser.add_argument("--aborts", type=int, default=1000, help="streams left by their clients, at least")
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--out", type=Path, help="append a row to this file")
    given = parser.parse_args(arguments)
    seconds = 60 * given.minutes
    # A cache that is soon touched everywhere, so that what memory grows by later is a leak.
    limits = ("--max-num-seqs", "16", "--max-waiting", "40", "--kv-cache-memory", "24MiB")
    with ServerProcess("--model", str(given.model), *limits) as server:
        start = time.monotonic()
        soak = Soak(server.url, start + seconds, given.aborts)
        before = asyncio.run(run(soak, given.clients, server, seconds))
        metrics = settled(server.url)
        grown, took = server.memory - before, time.monotonic() - start
        status = server.stop()
        found = complaints(soak, server.log, metrics, grown, status)
    outcomes = Counter(map(str, soak.outcomes.values()))
    result = {"seconds": round(took, 1), "outcomes": dict(outcomes), "grown_bytes": grown, "complaints": found[:20]}
    print(json.dumps(result, indent=2))
    if given.out is not None:
        append(given.out, {"benchmark": "soak", "clients": given.clients, "result": result, **facts(given.model, 0)})
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
