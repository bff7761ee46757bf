"""What was compiled ahead is what an engine launches: it finds every kernel in the cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cpu.tiny_models import tiny

SCRIPT = """
import sys
from pathlib import Path
from flexmoe import LLM, SamplingParams

folder, cache = sys.argv[1], Path(sys.argv[2])
made = lambda: {path.parent.name: path.name for path in cache.rglob("*.cubin")}
options = {"dtype": "bfloat16", "device": "cuda", "num_blocks": 512, "max_num_seqs": 16}
with LLM(folder, **options) as llm:
    llm.engine._compiling.wait()
    before = made()
    for count in (1, 3, 7, 16):
        for params in ({"temperature": 0}, {"seed": 1}, {"top_p": 0.9, "seed": 1}):
            prompts = [[5 + n, 17, 9] * (1 + 2 * n) for n in range(count)]
            llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True, **params))
print(len(before), "compiled ahead,", "missing:", sorted(set(made().items()) - set(before.items())))
"""


def test_an_engine_compiles_nothing_that_was_compiled_ahead(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny("olmoe")), str(tmp_path / "triton")], env=environment,
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "missing: []" in done.stdout, done.stdout[-2000:]
    assert int(done.stdout.split()[0]) > 20
