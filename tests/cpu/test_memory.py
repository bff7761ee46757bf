"""Steady memory: requests leave nothing behind, and the KV cache keeps to its budget."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flexmoe import LLM, SamplingParams
from flexmoe.engine import startup
from flexmoe.layers.kv_cache import block_bytes
from tests.cpu.serving import assert_idle, open_llm
from tests.cpu.tiny_models import tiny

# 250 requests of every kind: long and short, sampled, stopped, in several samples, streamed to their end or not.
PROGRAM = """
import gc, json, random, sys
import psutil
from flexmoe import LLM, RequestError, SamplingParams

# A small cache, soon full: its memory is taken when it is first written.
llm = LLM(sys.argv[1], expert_backend=sys.argv[2], dtype="float32", threads=1, num_blocks=32, max_num_batched_tokens=24)
rng = random.Random(0)
KINDS = (
    SamplingParams(temperature=0, max_tokens=8),
    SamplingParams(max_tokens=8, stop=["a", "b"], top_p=0.9, repetition_penalty=1.2),
    SamplingParams(max_tokens=8, n=3, logprobs=2),
    SamplingParams(max_tokens=8, min_tokens=2, logit_bias={7: 1.0}),
)

def prompt():
    return [rng.randrange(3, 320) for _ in range(rng.randint(1, 60))]

def serve(count):
    for number in range(count // 5):
        params = KINDS[number % len(KINDS)]
        llm.generate([prompt(), prompt()], params)
        for output in llm.stream(prompt(), params):
            pass
        for output in llm.stream(prompt(), params):
            break
        try:
            llm.generate([prompt(), [5] * 1000], params)
        except RequestError:
            pass
    del output
    gc.collect()
    return psutil.Process().memory_info().rss, len(gc.get_objects())

serve(20)
before, after = serve(50), serve(200)
engine = llm.engine
held = [len(vars(engine)["_tracked"]), len(vars(engine)["_owner"]), len(vars(llm)["_unseen"])]
print(json.dumps({"bytes": after[0] - before[0], "objects": after[1] - before[1], "held": held}))
"""


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_200_requests_leave_no_growth(backend: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tiny("mixtral")), backend]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    growth = json.loads(result.stdout)
    assert growth["held"] == [0, 0, 0]
    assert growth["objects"] < 100
    assert growth["bytes"] < 2 * 2**20  # a thread's first allocation takes as much; 10 kB a request would show


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("budget", [2**14, 100_000, 2**20, 2**20 + 2**14 - 1])
def test_the_cache_keeps_to_its_budget(budget: int, dtype: str) -> None:
    """And takes all of it but what is less than a block."""
    with open_llm(kv_cache_memory=budget, dtype=dtype) as llm:
        layers = llm.engine.runner.cache.layers
        taken = sum(layer.numel() * layer.element_size() for layer in layers)
        about = llm.describe()
        assert about["kv_cache_bytes"] == taken
        block = block_bytes(llm.config, about["block_size"], layers[0].dtype)
        assert budget - block < taken <= budget
        assert about["kv_cache_blocks"] * block == taken
        outputs = llm.generate([[5 + i] * 10 for i in range(20)], SamplingParams(max_tokens=8, ignore_eos=True))
        assert sum(len(output.token_ids) for output in outputs) == 20 * min(8, llm.engine.max_model_len - 10)
        assert_idle(llm)


def test_without_a_budget_the_cache_holds_every_seat_s_full_context() -> None:
    with LLM(tiny("mixtral"), dtype="float32", threads=1, max_num_seqs=3, max_model_len=100, block_size=8) as llm:
        assert llm.describe()["kv_cache_blocks"] == 3 * 13


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, []),
        ({"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "inactive_file 1\n"}, []),
        ({"memory.max": "1000\n", "memory.current": "300\n", "memory.stat": "anon 7\ninactive_file 100\n"}, [800]),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "300",
                "memory/memory.stat": "total_inactive_file 50",
            },
            [750],
        ),
    ],
)
def test_a_containers_memory_bounds_what_is_free(
    files: dict[str, str], left: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(startup, "_CGROUP", tmp_path)
    monkeypatch.setattr(startup, "_machine_memory", lambda: 900)
    assert startup._container_memory() == left
    assert startup._available_memory() == min([900, *left])
