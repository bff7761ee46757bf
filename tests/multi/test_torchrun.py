"""Under torchrun: the first process drives, the others serve; nothing of the script after LLM() runs twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from flexmoe import LLM, SamplingParams
from tests.cpu.tiny_models import tiny

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, signal, sys
from flexmoe import LLM, SamplingParams
OPTIONS = dict(dtype="float32", device="cpu", threads=1, max_model_len=64, num_blocks=40)
with LLM(sys.argv[1], tensor_parallel_size=2, expert_parallel_size=2, **OPTIONS) as llm:
    print("first", *llm.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))[0].token_ids)
print("end")
"""


def torchrun(tmp_path: Path, processes: int) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*launcher, str(script), str(tiny("mixtral"))],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip


def test_a_script_under_torchrun(tmp_path: Path) -> None:
    result = torchrun(tmp_path, 2)
    with LLM(tiny("mixtral"), dtype="float32", threads=1, max_model_len=64, num_blocks=40) as llm:
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        expected = " ".join(map(str, llm.generate([5, 6, 7], params)[0].token_ids))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n") == [f"first {expected}", "end", ""]


def test_another_number_of_processes_than_ranks(tmp_path: Path) -> None:
    result = torchrun(tmp_path, 3)
    assert result.returncode != 0
    assert "torchrun started 3 processes, but the plan has 2 ranks" in result.stderr
