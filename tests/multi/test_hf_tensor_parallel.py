"""benchmarks/hf_tensor_parallel.py: transformers in slices on two processes, of a model with files and of a preset."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu.tiny_models import tiny
from tests.multi.test_supervisor import ROOT


@pytest.mark.parametrize("model", ["files", "preset"])
def test_a_row_a_batch(tmp_path: Path, model: str) -> None:
    out = tmp_path / "rows.jsonl"
    words = [str(tiny("mixtral"))] if model == "files" else ["tinymistral-6x248m", "--layers", "1"]
    words += ["--batch", "1,2", "--prompt-len", "8", "--output-len", "2", "--out", str(out)]
    script = [str(ROOT / "benchmarks" / "hf_tensor_parallel.py"), *words]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launcher, *script], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["engine"], row["params"]["batch"], row["config"]["ranks"]) for row in rows] == [
        ("hf-tensor", 1, 2), ("hf-tensor", 2, 2),
    ]  # fmt: skip
    for row in rows:
        result = row["result"]
        assert result["first_token_ms"]["median"] > 0
        step = result["step_ms"]["median"]  # a difference of two times, either of which other programs may lengthen
        assert result["tokens_per_s"] == pytest.approx(1e3 * row["params"]["batch"] / step, rel=0.01, abs=0.1)
    assert rows[0]["model"]["layers"] == (1 if model == "preset" else 2)
