"""Hugging Face transformers with its own tensor-parallel plan, to stand beside benchmarks/strategies.py.

    torchrun --nproc-per-node 4 benchmarks/hf_tensor_parallel.py olmoe-1b-7b --device cuda --dtype bfloat16
             [--layers N] [--batch 1,8] [--prompt-len 64] [--output-len 32] [--out rows.jsonl]

A preset has no files, which its loading in slices needs: the first process writes a checkpoint of random weights, as
transformers initialises them, to a temporary folder, which takes as much space as the model. So its tokens are others
than ours. A sample is what it is there, and the rows are of the same kind, of engine "hf-tensor". Needs the package
accelerate beside transformers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from flexmoe.bench.bandwidth import read_bandwidth
from flexmoe.bench.record import append, facts, summary
from flexmoe.bench.subject import Changes, Subject, open_subject
from flexmoe.bench.workload import make_prompts

_REPEATS = 3


def checkpoint(subject: Subject, folder: Path, dtype: torch.dtype, device: torch.device) -> Path:
    """A folder with weights: the model's own, or `folder`, once the first process has written random ones there."""
    if subject.load_format != "dummy":
        return subject.folder
    if dist.get_rank() == 0:
        config = transformers.AutoConfig.from_pretrained(subject.folder)
        with device:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder)
        del model
    dist.barrier()
    return folder


def timed(model: Any, prompts: Sequence[list[int]], count: int) -> float:
    """Seconds for exactly so many tokens after each prompt, on all ranks."""
    ids = torch.tensor(prompts, device=model.device)  # [B, prompt]
    dist.barrier()
    start = time.perf_counter()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    assert out.shape[1] == ids.shape[1] + count
    dist.barrier()
    return time.perf_counter() - start


def measure(model: Any, prompts: Sequence[list[int]], count: int) -> dict[str, Any]:
    """A decode step, (time for N + 1 tokens - time for 1) / N, and the first tokens of all prompts."""
    timed(model, prompts, count + 1)
    firsts = [timed(model, prompts, 1) for _ in range(_REPEATS)]
    steps = [(timed(model, prompts, count + 1) - first) / count for first in firsts]
    step = summary([1e3 * each for each in steps])
    return {
        "step_ms": step,
        "tokens_per_s": round(1e3 * len(prompts) / step["median"], 1),
        "first_token_ms": summary([1e3 * each for each in firsts]),
        "samples": _REPEATS,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Measure; the first process prints, and appends rows."""
    args = _arguments(words)
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device(args.device, local) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    transformers.utils.logging.set_verbosity_error()
    dtype = getattr(torch, args.dtype)
    with (
        open_subject(args.model, changes=Changes(layers=args.layers)) as subject,
        tempfile.TemporaryDirectory() as made,
    ):
        shared = [made]
        dist.broadcast_object_list(shared)  # the first process's folder
        folder = checkpoint(subject, Path(shared[0]), dtype, device)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, tp_plan="auto").eval()
        about = facts(device) | {"read_gb_s": round(read_bandwidth(device) / 1e9, 1)}
        for batch in args.batch:
            prompts = make_prompts(subject.config.vocab_size, batch, args.prompt_len, args.seed)
            with torch.inference_mode():
                result = measure(model, prompts, args.output_len)
            asked = {name: getattr(args, name) for name in ("prompt_len", "output_len", "dtype", "seed")}
            row = {"benchmark": "strategies", "engine": "hf-tensor", "model": subject.facts()}
            row |= {"params": {"batch": batch} | asked, "result": result} | about
            row |= {"config": {"strategy": "tensor", "ranks": dist.get_world_size()}}
            if rank == 0:
                step = result["step_ms"]["median"]
                print(f"hf-tensor, {dist.get_world_size()} ranks, batch {batch}: {step:.2f} ms a step", flush=True)
                if args.out:
                    append(args.out, row)
        dist.barrier()
    dist.destroy_process_group()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", nargs="?", help="a folder, a preset or a name on the Hub; none: the built-in model")
    parser.add_argument("--layers", type=int, help="of a preset: only so many")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=_numbers, default=[1, 8])
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
