"""A worker process: one loaded engine that computes when it is told to and sleeps otherwise.

Run as a script by pool.py. Speaks JSON, one object a line: requests on stdin, answers on stdout.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.engines import PlainStream, TimedEngine, make_engine


def peak_rss_mb() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def serve() -> None:
    """Answer requests until stdin closes. Prints of libraries go to stderr: stdout is for answers only."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    engine: TimedEngine | PlainStream | None = None
    for line in sys.stdin:
        request = json.loads(line)
        answer: dict[str, Any]
        try:
            if engine is None:
                engine = make_engine(request["kind"], request["options"])
                answer = {"about": engine.about()}
            elif request.get("distinct"):
                answer = {"distinct": engine.distinct_experts(request["prompts"], request["max_tokens"])}  # type: ignore[attr-defined]
            elif isinstance(engine, PlainStream):
                answer = {"rates": engine.rates(request["reads"])}
            else:
                answer = run(engine, request)
        except Exception as error:  # noqa: BLE001 - the parent decides what a failure means
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        answers.write(json.dumps(answer) + "\n")


def run(engine: TimedEngine, request: dict[str, Any]) -> dict[str, Any]:
    """Some calls that are not timed, then some that are."""
    arguments = (request["prompts"], request["max_tokens"], request["variant"])
    for _ in range(request["warmup"]):
        engine.generate(*arguments)
    calls = [engine.generate(*arguments) for _ in range(request["repeats"])]
    return {"calls": [asdict(call) for call in calls], "peak_rss_mb": peak_rss_mb()}


if __name__ == "__main__":
    serve()
