"""The long scripts, shortened: the soak holds its promises in seconds, the overhead is measured and written down."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_a_soak_loses_no_request(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    done = run("soak.py", "--minutes", "0.05", "--clients", "60", "--aborts", "10", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads(out.read_text())["result"]["outcomes"]
    assert outcomes.keys() >= {"200", "400", "429", "left"}  # 60 clients are more than may run or wait
    assert outcomes["left"] >= 10


def test_what_http_costs_is_measured(tmp_path: Path) -> None:
    """How much it is means nothing here: other tests run beside."""
    out = tmp_path / "rows.jsonl"
    done = run("server_overhead.py", "--streams", "4", "--tokens", "16", "--rounds", "1", "--out", str(out))
    assert done.returncode in (0, 1), done.stderr
    row = json.loads(out.read_text())
    assert row["result"]["ratio"]["median"] > 0
    assert row["params"]["pieces_of_last_round"] > 0
