"""What HTTP costs: tokens a second of 16 streams through the server, beside the same work without one.

    python benchmarks/server_overhead.py [--streams 16] [--tokens 256] [--rounds 5] [--model FOLDER] [--out rows.jsonl]

The engine and the server, each with the same options, take turns in answering the same greedy prompts with exactly so
many tokens. The client, which reads and counts and does nothing else, runs on the same cores. The ratio must be at
least 0.9. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from pathlib import Path

from harness.record import ROOT, append, facts, summary
from harness.server import ServerProcess

from flexmoe import LLM, SamplingParams

BUILTIN = ROOT / "src" / "flexmoe" / "assets" / "builtin"
RESULTS = ROOT / "benchmarks" / "results" / "cpu_server.jsonl"
FLOOR = 0.9


def prompts(count: int) -> list[str]:
    """Alike in length, not in words."""
    return [f"Once upon a time there were {number} old kings who" for number in range(10, 10 + count)]


def offline(llm: LLM, streams: int, tokens: int) -> float:
    """Tokens a second of the engine alone."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate(prompts(streams), params)
    return sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - start)


async def through_http(port: int, streams: int, tokens: int) -> tuple[float, int]:
    """Tokens a second through the server, and the pieces they came in."""
    start = time.perf_counter()
    found = await asyncio.gather(*(read(port, prompt, tokens) for prompt in prompts(streams)))
    seconds = time.perf_counter() - start
    return sum(count for count, _ in found) / seconds, sum(pieces for _, pieces in found)


async def read(port: int, prompt: str, tokens: int) -> tuple[int, int]:
    """Tokens of one stream, by its usage, and pieces."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    content = json.dumps({**body, "stream_options": {"include_usage": True}}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    pieces, tail = 0, b""
    while data := await reader.read(2**16):
        pieces += data.count(b"data: ")
        tail = (tail + data)[-1000:]
    writer.close()
    usage = re.search(rb'"completion_tokens":(\d+)', tail)
    if usage is None:
        raise SystemExit(f"the server's answer is not whole: {tail!r}")
    return int(usage[1]), pieces - 2  # without usage and [DONE]


def main(arguments: list[str] | None = None) -> int:
    """0 if the server keeps up."""
    parser = argparse.ArgumentParser(description="Measure what HTTP costs.")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--out", type=Path, default=RESULTS, help="append a row to this file")
    given = parser.parse_args(arguments)
    alone, served, pieces = [], [], 0
    with LLM(str(given.model)) as llm, ServerProcess("--model", str(given.model)) as server:
        threads = llm.describe()["threads"]
        for number in range(given.rounds + 1):
            speed = offline(llm, given.streams, given.tokens)
            speed_served, pieces = asyncio.run(through_http(server.port, given.streams, given.tokens))
            if number:  # the first round warms up
                alone.append(speed)
                served.append(speed_served)
        server.stop()
    ratios = [with_server / without for with_server, without in zip(served, alone, strict=True)]
    result = {"offline_tokens_per_s": summary(alone), "http_tokens_per_s": summary(served), "ratio": summary(ratios)}
    params = {"streams": given.streams, "tokens": given.tokens, "pieces_of_last_round": pieces}
    row = {"benchmark": "server_overhead", "engine": "flexmoe", "params": params, "result": result}
    append(given.out, {**row, **facts(given.model, threads)})
    print(json.dumps(row, indent=2))
    return 0 if result["ratio"]["median"] >= FLOOR else 1


if __name__ == "__main__":
    sys.exit(main())
