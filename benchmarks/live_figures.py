"""What watching costs: tokens a second of a busy server with a listener to its live figures, beside without one.

    python benchmarks/live_figures.py [--streams 4] [--tokens 256] [--rounds 40] [--rate 60] [--out rows.jsonl]

Rounds with and without take turns: with, without, without, with. The server answers greedy prompts with exactly so many
tokens; meanwhile one listener reads `rate` events a second, and while it does the server looks at its experts as often
as it allows itself. The listener runs on the same cores. `idle_cpu_us`: processor time of the server for one event,
while it does nothing else. `cpu_us_per_token`: processor time of the server for one token, which other work on the
machine disturbs less than it does the speed. The loss must be below 1 %. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import psutil
from harness.record import ROOT, append, facts, summary
from harness.server import ServerProcess

from flexmoe.engine.device import physical_cores

BUILTIN = ROOT / "src" / "flexmoe" / "assets" / "builtin"
RESULTS = ROOT / "benchmarks" / "results" / "cpu_server.jsonl"
MOST_LOST = 0.01
IDLE_SECONDS = 5.0


class Listener:
    """Reads live figures in a thread, and counts them."""

    def __init__(self, port: int, rate: float) -> None:
        self.events = 0
        self._socket = socket.create_connection(("127.0.0.1", port))
        path = f"/v1/flexmoe/events?interval={1 / rate:.6f}&changes=true"
        self._socket.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while data := self._socket.recv(2**16):
            self.events += data.count(b"event: figures")

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()


@contextlib.contextmanager
def listening(port: int, rate: float, wanted: bool) -> Iterator[Listener | None]:
    """A listener, or none."""
    listener = Listener(port, rate) if wanted else None
    try:
        yield listener
    finally:
        if listener is not None:
            listener.close()


def speed(port: int, streams: int, tokens: int) -> float:
    """Tokens a second of so many answers at once."""
    start = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(lambda number: complete(port, number, tokens), range(streams)))
    return streams * tokens / (time.perf_counter() - start)


def complete(port: int, number: int, tokens: int) -> None:
    """One answer, read whole."""
    prompt = f"Once upon a time there were {number + 10} old kings who"
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    found = json.loads(connection.getresponse().read())
    if found["usage"]["completion_tokens"] != tokens:
        raise SystemExit(f"the server's answer is not whole: {found}")
    connection.close()


def idle_cost(server: ServerProcess, rate: float) -> tuple[float, float]:
    """Microseconds of processor time for one event, and events a second, while nothing else is done."""
    rest = _busy_seconds(server.pid)
    with listening(server.port, rate, True) as listener:
        watched = _busy_seconds(server.pid)
        assert listener is not None
        events = listener.events
    return (watched - rest) / max(1, events) * 1e6, events / IDLE_SECONDS


def _busy_seconds(pid: int) -> float:
    before = _cpu_seconds(pid)
    time.sleep(IDLE_SECONDS)
    return _cpu_seconds(pid) - before


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def main(arguments: list[str] | None = None) -> int:
    """0 if watching costs less than it may."""
    parser = argparse.ArgumentParser(description="Measure what watching costs.")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--rate", type=float, default=60.0)
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--out", type=Path, default=RESULTS, help="append a row to this file")
    given = parser.parse_args(arguments)
    speeds: dict[bool, list[float]] = {True: [], False: []}
    costs: dict[bool, list[float]] = {True: [], False: []}
    with ServerProcess("--model", str(given.model)) as server:
        speed(server.port, given.streams, given.tokens)
        cost, rate = idle_cost(server, given.rate)
        for number in range(given.rounds):
            for watched in (True, False) if number % 2 else (False, True):
                with listening(server.port, given.rate, watched):
                    before = _cpu_seconds(server.pid)
                    speeds[watched].append(speed(server.port, given.streams, given.tokens))
                    spent = _cpu_seconds(server.pid) - before
                costs[watched].append(spent / (given.streams * given.tokens) * 1e6)
        server.stop()
    ratios = [watched / alone for watched, alone in zip(speeds[True], speeds[False], strict=True)]
    cpu_ratios = [watched / alone for watched, alone in zip(costs[True], costs[False], strict=True)]
    result = {
        "alone_tokens_per_s": summary(speeds[False]),
        "watched_tokens_per_s": summary(speeds[True]),
        "ratio": summary(ratios),
        "alone_cpu_us_per_token": summary(costs[False]),
        "watched_cpu_us_per_token": summary(costs[True]),
        "cpu_ratio": summary(cpu_ratios),
        "idle_cpu_us": round(cost, 1),
        "events_per_s": round(rate, 1),
    }
    params = {"streams": given.streams, "tokens": given.tokens, "rounds": given.rounds, "rate": given.rate}
    row = {"benchmark": "live_figures", "engine": "flexmoe", "params": params, "result": result}
    append(given.out, {**row, **facts(given.model, physical_cores())})
    print(json.dumps(row, indent=2))
    return 0 if result["ratio"]["median"] >= 1 - MOST_LOST else 1


if __name__ == "__main__":
    sys.exit(main())
