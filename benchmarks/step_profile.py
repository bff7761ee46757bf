"""Where a decode step's time goes: each kernel's share, as the GPU's own clocks saw it inside the graph.

    python benchmarks/step_profile.py MODEL [--batch 1,8] [--prompt-len 128] [--layers N] [--out rows.jsonl]

Enters: a model or preset (random weights). Leaves: a table for each batch, kernels in the order of their time, and the
step's span from the first kernel's start to the last one's end; what is missing between the two is gaps.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from flexmoe import SamplingParams
from flexmoe.bench.record import append, facts
from flexmoe.bench.subject import Changes, open_subject
from flexmoe.llm import LLM

_STEPS = 16


def main() -> None:
    args = _arguments()
    batches = [int(part) for part in args.batch.split(",")]
    with open_subject(args.model, "dummy", Changes(layers=args.layers)) as subject:
        model = str(getattr(subject, "model", args.model))
        options: dict[str, Any] = {"max_num_seqs": max(batches), "max_model_len": args.prompt_len + 128}
        with LLM(model, load_format="dummy", device="cuda", max_num_batched_tokens=16384, **options) as llm:
            for batch in batches:
                rows, span = profile_steps(llm, batch, args.prompt_len)
                _print(args.model, batch, rows, span)
                if args.out:
                    shared = facts(torch.device("cuda")) | {"benchmark": "step_profile", "model": args.model}
                    append(Path(args.out), shared | {"batch": batch, "step_us": span, "kernels": rows})


def profile_steps(llm: LLM, batch: int, prompt_len: int) -> tuple[list[dict[str, Any]], float]:
    """Kernels of a steady decode step with microseconds and launches each, and the step's span in microseconds."""
    generator = torch.Generator().manual_seed(0)
    engine, vocab = llm.engine, llm.config.vocab_size
    params = SamplingParams(temperature=0, max_tokens=_STEPS + 24, ignore_eos=True)
    for _ in range(batch):
        engine.add_request(torch.randint(vocab, (prompt_len,), generator=generator).tolist(), params)
    for _ in range(8):  # the prompts, the capture, and some steps to settle
        engine.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(_STEPS):
            engine.step()
        torch.cuda.synchronize()
    while engine.has_unfinished:
        engine.step()
    times: dict[str, list[float]] = defaultdict(list)
    events = sorted((e for e in seen.events() if e.device_time_total > 0), key=lambda e: e.time_range.start)
    for event in events:
        times[event.name].append(event.device_time_total)
    rows = [
        {"kernel": name, "launches": len(t) / _STEPS, "us": sum(t) / _STEPS, "median_us": statistics.median(t)}
        for name, t in times.items()
    ]
    span = (events[-1].time_range.end - events[0].time_range.start) / _STEPS
    return sorted(rows, key=lambda row: -row["us"]), span


def _print(model: str, batch: int, rows: list[dict[str, Any]], span: float) -> None:
    total = sum(row["us"] for row in rows)
    print(f"\n{model}, batch {batch}: {span:.0f} us a step, {total:.0f} us in kernels (overlaps counted twice)")
    for row in rows[:24]:
        print(f"  {row['us']:9.1f} us  {row['launches']:6.1f} x {row['median_us']:8.2f} us  {row['kernel'][:70]}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--batch", default="1,8,32,128")
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
