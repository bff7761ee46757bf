"""Throughput: many prompts at once, without a server. Enters: a Subject and what is asked. Leaves: a row.

Ours takes all requests together, as many at a time as it has seats; transformers, whose batches cannot change under
way, takes them in batches. The floor is that of the decode steps alone, if every step had as many rows as there are
seats and all experts were equally likely: prompts are not in it.

How busy the device was is told by a second run of ours, of which a window is watched once it is in full swing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from flexmoe.bench.bandwidth import read_bandwidth
from flexmoe.bench.busy import busy_share
from flexmoe.bench.engines import FlexMoE, Prompts, TimedEngine, greedy
from flexmoe.bench.hugging_face import HuggingFace, import_transformers
from flexmoe.bench.latency import HF_DEFAULT, OURS
from flexmoe.bench.record import facts
from flexmoe.bench.subject import Subject
from flexmoe.bench.workload import make_prompts
from flexmoe.config.engine import MAX_ROWS, CacheConfig
from flexmoe.engine.device import choose_device, set_threads
from flexmoe.errors import ConfigError
from flexmoe.planner.floor import expected_distinct, floor

Row = dict[str, Any]

ENGINES = (OURS, HF_DEFAULT)  # not hf-best: compiled code is bound to one batch size
_HF_BATCH = 16
_WARM_UP_TOKENS = 4
_WATCHED_STEPS = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputOptions:
    """requests: as many prompts of prompt_len tokens, each answered with output_len.

    max_num_seqs: None: all requests at once, up to what the fastest kernels take.
    """

    engine: str = OURS
    requests: int = 512
    prompt_len: int = 512
    output_len: int = 128
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    one_pass: bool = False
    prompts_ahead: bool = True
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"engine={self.engine!r} is not one of {', '.join(ENGINES)}.")

    @property
    def seats(self) -> int:
        """Requests of ours that run together."""
        return self.max_num_seqs or min(self.requests, MAX_ROWS)

    @property
    def batch(self) -> int:
        """Requests that an engine is given at once."""
        return self.requests if self.engine == OURS else _HF_BATCH


def measure(subject: Subject, options: ThroughputOptions) -> Row:
    """One engine, once after a warm-up. Raises MissingDependencyError for transformers that are not installed."""
    if options.engine != OURS:
        import_transformers()
    device = choose_device(options.device)
    set_threads(options.threads)
    ceiling = read_bandwidth(device)
    ours = FlexMoE(subject, _llm_options(subject, options))
    engine: TimedEngine = ours
    if options.engine != OURS:
        engine = HuggingFace(subject.folder, subject.config, ours.release())
    prompts = make_prompts(subject.config.vocab_size, options.requests, options.prompt_len, options.seed)
    result = _timed(engine, prompts, options) | _floor(subject, options, ours.dtype.itemsize, ceiling)
    result["percent_of_floor"] = round(100 * result["floor_seconds"] / result["seconds"], 2)
    about = engine.about()
    if engine is ours:
        result["device_busy_percent"] = round(100 * _busy(ours, prompts, options.output_len, result["steps"]), 2)
        ours.close()
    params = {name: getattr(options, name) for name in ("requests", "prompt_len", "output_len", "seed")}
    params |= {"batch": options.batch, "dtype": str(ours.dtype).removeprefix("torch.")}
    if options.max_num_batched_tokens is not None:
        params["max_num_batched_tokens"] = options.max_num_batched_tokens
    row = {"benchmark": "throughput", "engine": options.engine, "model": subject.facts(), "params": params}
    return row | {"config": about, "result": result} | facts(device)


def _timed(engine: TimedEngine, prompts: Prompts, options: ThroughputOptions) -> Row:
    """Warmed up first: on a GPU by the same run, which captures a graph for each number of rows that will come."""
    batch = options.batch
    on_gpu = choose_device(options.device).type == "cuda"
    engine.generate(prompts[:batch], options.output_len if on_gpu else _WARM_UP_TOKENS)
    steps = engine.engine.metrics.steps if isinstance(engine, FlexMoE) else None
    start = time.perf_counter()
    tokens = sum(
        _answered(engine, prompts[at : at + batch], options.output_len) for at in range(0, len(prompts), batch)
    )
    seconds = time.perf_counter() - start
    result: Row = {
        "seconds": round(seconds, 4),
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens / seconds, 2),
        "total_tokens_per_s": round((tokens + sum(map(len, prompts))) / seconds, 2),
    }
    if isinstance(engine, FlexMoE) and steps is not None:
        result["steps"] = engine.engine.metrics.steps - steps
    return result


def _floor(subject: Subject, options: ThroughputOptions, itemsize: int, ceiling: float) -> Row:
    """What decoding alone takes at least, in steps of full rows."""
    rows = min(options.seats, options.requests)
    context = options.prompt_len + options.output_len / 2
    distinct = expected_distinct(subject.config, rows)
    step = floor(subject.config, rows, context, itemsize, distinct).total / ceiling
    least = step * (options.output_len - 1) * options.requests / rows
    return {"floor_seconds": round(least, 5), "read_gb_s": round(ceiling / 1e9, 1)}


def _busy(ours: FlexMoE, prompts: Prompts, count: int, steps: int) -> float:
    """Of a run like the one that took so many steps, from its first third on."""
    engine = ours.engine
    ids = [engine.add_request(prompt, greedy(count)) for prompt in prompts]
    try:
        for _ in range(steps // 3):
            engine.step()
        return busy_share(engine, min(_WATCHED_STEPS, max(1, steps // 3)))
    finally:
        engine.discard(ids)


def _answered(engine: TimedEngine, prompts: Prompts, count: int) -> int:
    return sum(map(len, engine.generate(prompts, count)))


def _llm_options(subject: Subject, options: ThroughputOptions) -> Row:
    tokens = options.max_num_batched_tokens
    # One block more for each than it needs: the scheduler admits nobody without one to spare for those that run.
    longest = options.prompt_len + options.output_len + CacheConfig().block_size
    return {
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads,
        "one_pass": options.one_pass,
        "prompts_ahead": options.prompts_ahead,
        "seed": options.seed,
        "max_num_seqs": options.seats,
        "max_model_len": min(longest, subject.config.max_position),
        **({} if tokens is None else {"max_num_batched_tokens": tokens}),
    }
