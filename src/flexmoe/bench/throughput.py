"""Throughput: many prompts at once, without a server. Enters: a Subject and what is asked. Leaves: a row.

Ours takes all requests together; transformers, whose batches cannot change under way, takes them in batches. The floor
is that of the decode steps alone, if all requests were in each of them and all experts equally likely: prompts are not
in it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from flexmoe.bench.bandwidth import read_bandwidth
from flexmoe.bench.engines import FlexMoE, Prompts, TimedEngine
from flexmoe.bench.floor import expected_distinct, floor
from flexmoe.bench.hugging_face import HuggingFace
from flexmoe.bench.latency import OURS
from flexmoe.bench.record import facts
from flexmoe.bench.subject import Subject
from flexmoe.bench.workload import make_prompts
from flexmoe.engine.device import choose_device, set_threads

Row = dict[str, Any]

_HF_BATCH = 16
_WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputOptions:
    """requests: as many prompts of prompt_len tokens, each answered with output_len."""

    engine: str = OURS
    requests: int = 64
    prompt_len: int = 128
    output_len: int = 64
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0


def measure(subject: Subject, options: ThroughputOptions) -> Row:
    """One engine, once after a warm-up. Raises MissingDependencyError for transformers that are not installed."""
    device = choose_device(options.device)
    set_threads(options.threads)
    ceiling = read_bandwidth(device)
    ours = FlexMoE(subject, _llm_options(options))
    engine: TimedEngine = ours
    batch = options.requests
    if options.engine != OURS:
        engine, batch = HuggingFace(subject.folder, subject.config, ours.release()), _HF_BATCH
    prompts = make_prompts(subject.config.vocab_size, options.requests, options.prompt_len, options.seed)
    engine.generate(prompts[:batch], _WARM_UP_TOKENS)
    start = time.perf_counter()
    tokens = sum(
        _answered(engine, prompts[at : at + batch], options.output_len) for at in range(0, len(prompts), batch)
    )
    seconds = time.perf_counter() - start
    about = engine.about()
    if engine is ours:
        ours.close()
    context = options.prompt_len + options.output_len / 2
    distinct = expected_distinct(subject.config, options.requests)
    step = floor(subject.config, options.requests, context, ours.dtype.itemsize, distinct).total / ceiling
    least = step * (options.output_len - 1)
    result = {
        "seconds": round(seconds, 4),
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens / seconds, 2),
        "floor_seconds": round(least, 5),
        "percent_of_floor": round(100 * least / seconds, 2),
        "read_gb_s": round(ceiling / 1e9, 1),
    }
    params = {name: getattr(options, name) for name in ("requests", "prompt_len", "output_len", "seed")}
    params |= {"batch": batch, "dtype": str(ours.dtype).removeprefix("torch.")}
    row = {"benchmark": "throughput", "engine": options.engine, "model": subject.facts(), "params": params}
    return row | {"config": about, "result": result} | facts(device)


def _answered(engine: TimedEngine, prompts: Prompts, count: int) -> int:
    return sum(map(len, engine.generate(prompts, count)))


def _llm_options(options: ThroughputOptions) -> Row:
    return {
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads,
        "seed": options.seed,
        "max_num_seqs": options.requests,
        "max_model_len": options.prompt_len + options.output_len + 1,
    }
