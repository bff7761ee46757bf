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
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from harness.step_times import add_question, asked, step_times

from flexmoe.bench.bandwidth import read_bandwidth
from flexmoe.bench.record import append, facts
from flexmoe.bench.subject import Changes, Subject, open_subject
from flexmoe.bench.workload import make_prompts


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
                result = step_times(partial(timed, model, prompts), batch, args.output_len)
            row = {"benchmark": "strategies", "engine": "hf-tensor", "model": subject.facts()}
            row |= {"params": {"batch": batch} | asked(args), "result": result} | about
            row |= {"config": {"strategy": "tensor", "ranks": dist.get_world_size()}}
            if rank == 0:
                step = result["step_ms"]["median"]
                print(f"hf-tensor, {dist.get_world_size()} ranks, batch {batch}: {step:.2f} ms a step", flush=True)
                if args.out:
                    append(args.out, row)
        dist.barrier()
    dist.destroy_process_group()


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add_question(parser)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
