"""From the start of a process to its first token, in the few lines a user would write. Leaves: seconds, peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from harness.pool import child_environment

# The second call, of 64 tokens, is for the peak of memory; it comes after the time was taken.
_END = """
import json, resource
print(json.dumps({"text": text, "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)
"""
FLEXMOE = """
import sys
from flexmoe import LLM, SamplingParams
llm = LLM(sys.argv[1], threads=int(sys.argv[3]))
text = llm.generate(sys.argv[2], SamplingParams(temperature=0, max_tokens=1))[0].text
print(text, flush=True)
llm.generate(sys.argv[2], SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
"""
TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(int(sys.argv[3]))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="DTYPE")
inputs = tokenizer(sys.argv[2], return_tensors="pt")
ids = model.generate(**inputs, do_sample=False, max_new_tokens=1)
text = tokenizer.decode(ids[0, inputs.input_ids.shape[1]:])
print(text, flush=True)
model.generate(**inputs, do_sample=False, min_new_tokens=64, max_new_tokens=64)
"""
# For models without a tokenizer: a prompt of token ids.
FLEXMOE_IDS = """
import json, sys
from flexmoe import LLM, SamplingParams
llm = LLM(sys.argv[1], threads=int(sys.argv[3]), dtype="bfloat16")
prompt = json.loads(sys.argv[2])
text = str(llm.generate([prompt], SamplingParams(temperature=0, max_tokens=1))[0].token_ids[0])
print(text, flush=True)
llm.generate([prompt], SamplingParams(temperature=0, max_tokens=64, ignore_eos=True))
"""
TRANSFORMERS_IDS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="bfloat16")
ids = torch.tensor([json.loads(sys.argv[2])])
text = str(int(model.generate(ids, do_sample=False, max_new_tokens=1)[0, -1]))
print(text, flush=True)
model.generate(ids, do_sample=False, min_new_tokens=64, max_new_tokens=64)
"""
LLAMA_CPP_IDS = """
import json, sys
sys.path.insert(0, "BENCHMARKS")
from harness.llama import LlamaCppEngine
engine = LlamaCppEngine(sys.argv[1], threads=int(sys.argv[3]))
prompt = json.loads(sys.argv[2])
text = str(engine.generate([prompt], 1, {}).tokens[0][0])
print(text, flush=True)
engine.generate([prompt], 64, {})
""".replace("BENCHMARKS", str(Path(__file__).parents[1]))


def scripts() -> dict[str, str]:
    """Every way to start, by name."""
    dtypes = {"fp32": "float32", "bf16": "bfloat16"}
    hf = {f"transformers {short}": TRANSFORMERS.replace("DTYPE", dtype) for short, dtype in dtypes.items()}
    return {"flexmoe auto": FLEXMOE, **hf}


def measure(
    script: str, model: Path, prompt: str, threads: int, python: str = sys.executable
) -> dict[str, float | str]:
    """Run one script in a fresh process of that environment. Raises RuntimeError with its last words if it fails."""
    command = [python, "-c", script + _END, str(model), prompt, str(threads)]
    start = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment()
    )
    assert process.stdout is not None
    process.stdout.readline()
    seconds = time.monotonic() - start
    rest, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"start-up script failed: {errors.strip().splitlines()[-1]}")
    return {"seconds": seconds, **json.loads(rest.splitlines()[-1])}
