"""Workers, seen from the process that measures. One computes at a time; the others' CPU time is read as proof."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import IO, Any

ROOT = Path(__file__).parents[2]
_SCRIPT = Path(__file__).with_name("worker.py")
_TICKS = os.sysconf("SC_CLK_TCK")
_READS = 5  # some 0.1 s


class WorkerError(RuntimeError):
    """The engine in a worker refused or died; the configuration is not available here."""


def child_environment() -> dict[str, str]:
    """This process's environment, with the checkout's package first, and no way to the hub."""
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Worker:
    """One engine in a process of its own."""

    def __init__(self, kind: str, options: dict[str, Any], log: IO[str], python: str = sys.executable) -> None:
        """Start and load. python: of the environment that has the engine. Raises WorkerError if it does not load."""
        self._process = subprocess.Popen(
            [python, str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            bufsize=1,
            env=child_environment(),
        )
        try:
            self.about: dict[str, Any] = self._ask({"kind": kind, "options": options})["about"]
        except WorkerError:
            self.stop()
            raise

    def run(
        self, prompts: list[list[int]], max_tokens: int, variant: dict[str, Any], *, warmup: int, repeats: int
    ) -> dict[str, Any]:
        """{"calls": [{"first", "total", "tokens"}], "peak_rss_mb"}. Raises WorkerError if the engine refuses."""
        request = {"prompts": prompts, "max_tokens": max_tokens, "variant": variant}
        return self._ask({**request, "warmup": warmup, "repeats": repeats})

    def distinct_experts(self, prompts: list[list[int]], max_tokens: int) -> list[float]:
        """Of each MoE layer, how many experts a decode step of these prompts reads; ours counts."""
        found: list[float] = self._ask({"distinct": True, "prompts": prompts, "max_tokens": max_tokens})["distinct"]
        return found

    def read_rate(self) -> float:
        """Bytes a second of a plain stream, if that is what this worker holds: the median of a few reads."""
        return median(self._ask({"reads": _READS})["rates"])

    @property
    def cpu_seconds(self) -> float:
        """CPU time this worker has used so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def stop(self) -> None:
        """End the process, and wait until its memory is free."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the worker died (exit status {self._process.wait()}).")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer


def cpu_seconds(workers: Iterable[Worker]) -> float:
    """CPU time of several workers together."""
    return sum(worker.cpu_seconds for worker in workers)
