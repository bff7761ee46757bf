"""Prove that the server starts: start it, ask one question, end it. Enters: nothing. Leaves: its answer, a status."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.request

SECONDS = 120.0
QUESTION = "What is the capital of Norway?"


def ask(url: str) -> str:
    """The answer to the question."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 20}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def main() -> int:
    """0 if it starts, answers and ends as it should."""
    command = [sys.executable, "-m", "flexmoe", "serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        watchdog = threading.Timer(SECONDS, server.kill)
        watchdog.start()
        assert server.stderr is not None
        url = ""
        for line in server.stderr:
            print(line, end="")
            if line.startswith("Serving at "):
                url = line.split()[2]
                break
        answer = ask(url) if url else ""
        server.send_signal(signal.SIGTERM)
        server.stderr.read()
        status = server.wait()
        watchdog.cancel()
    print(f"{QUESTION} {answer}" if answer else "the server did not start.")
    return status if "Oslo" in answer else 1


if __name__ == "__main__":
    sys.exit(main())
