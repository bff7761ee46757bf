"""Where a decode step's time goes. Enters: a model and what it decodes. Leaves: a Profile, its events and a row.

On a GPU the events are kernels, as torch's profiler saw them inside the step's graph; on a CPU they are stages, each
timed from the one before it. What no event covers is time in which the device waited for the host. Beside the time
of an operation stand the bytes that it must read, at the speed at which this device was measured to read.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flexmoe.bench.bandwidth import read_bandwidth
from flexmoe.bench.engines import FlexMoE
from flexmoe.bench.kernel_operations import Kernel, operations_of
from flexmoe.bench.record import facts
from flexmoe.bench.subject import Changes, Subject, open_subject
from flexmoe.bench.timeline import Mark, trace_step
from flexmoe.bench.workload import make_prompts
from flexmoe.config.model import ModelConfig
from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.device import choose_device, set_threads
from flexmoe.engine.engine import Engine
from flexmoe.errors import ConfigError
from flexmoe.planner.floor import floor

Row = dict[str, Any]

GAPS = "host gaps"
_SETTLE = 8  # steps before: the prompts, captures, and some to be in the middle of decoding
# Stages of a Timeline by what they are called here; the others keep their names.
_HOST = ("schedule", "batch", "update", "detokenizer")
_STAGES = {"attention": "attention with projections", "logits": "head", "moe": "experts with router"}
_STAGES |= dict.fromkeys(_HOST, "host: schedule, batch, text")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """torch_path: on a CPU decode in PyTorch, where router, dispatch, experts and combine are calls of their own."""

    model: str | None = None
    changes: Changes = field(default_factory=Changes)
    load_format: str = "auto"
    batch: int = 1
    prompt_len: int = 128
    steps: int = 16
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    torch_path: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """A kernel or a stage. start, seconds: from the first step's beginning. layer: -1 outside of layers."""

    name: str
    operation: str
    layer: int
    start: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Profile:
    """events: of all steps, in order. row: what is recorded; its result has the operations, longest first."""

    events: list[Event]
    row: Row

    def chrome_trace(self) -> Row:
        """The events as Chrome's chrome://tracing and Perfetto read them: a line for each operation, microseconds."""
        lines = {name: number for number, name in enumerate(dict.fromkeys(e.operation for e in self.events))}
        named = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": number, "args": {"name": name}}
            for name, number in lines.items()
        ]
        return {"traceEvents": named + [_traced(event, lines[event.operation]) for event in self.events]}


def _traced(event: Event, line: int) -> Row:
    at = {"ts": round(1e6 * event.start, 3), "dur": round(1e6 * event.seconds, 3), "args": {"layer": event.layer}}
    return {"name": event.name, "cat": event.operation, "ph": "X", "pid": 0, "tid": line} | at


def measure(options: ProfileOptions) -> Profile:
    """Decode some steps and watch. Raises ConfigError for torch_path on a GPU, and what `LLM` raises."""
    device = choose_device(options.device)
    set_threads(options.threads)
    if options.torch_path and device.type == "cuda":
        raise ConfigError("the path in PyTorch is for a CPU; on a GPU all operations are kernels of their own.")
    ceiling = read_bandwidth(device)
    with open_subject(options.model, options.load_format, options.changes) as subject:
        engine = FlexMoE(subject, _llm_options(options))
        try:
            return _profiled(options, subject, engine, ceiling)
        finally:
            engine.close()


def _profiled(options: ProfileOptions, subject: Subject, ours: FlexMoE, ceiling: float) -> Profile:
    prompts = make_prompts(subject.config.vocab_size, options.batch, options.prompt_len, options.seed)
    if options.torch_path:
        ours.engine.local_runner.model.native = None
    counted = ours.distinct_experts(prompts, options.steps)
    on_gpu = ours.device.type == "cuda"
    begin(ours.engine, prompts, options.steps)
    events, spans = _on_gpu(ours.engine, options.steps) if on_gpu else _on_cpu(ours.engine, options.steps)
    while ours.engine.has_unfinished:
        ours.engine.step()
    context = options.prompt_len + _SETTLE + options.steps / 2
    read = operation_bytes(subject.config, options.batch, context, ours.dtype.itemsize, counted)
    params = {name: getattr(options, name) for name in ("batch", "prompt_len", "steps", "seed", "torch_path")}
    params["dtype"] = str(ours.dtype).removeprefix("torch.")
    result = {
        "step_ms": round(1e3 * statistics.mean(spans), 4),
        "read_gb_s": round(ceiling / 1e9, 1),
        "operations": operations(events, spans, read, ceiling),
    }
    row = {"benchmark": "profile", "engine": "flexmoe", "model": subject.facts(), "params": params}
    return Profile(events, row | {"config": ours.about(), "result": result} | facts(ours.device))


def begin(engine: Engine, prompts: Sequence[list[int]], steps: int) -> None:
    """Have the engine in the middle of decoding all prompts."""
    params = SamplingParams(temperature=0, max_tokens=_SETTLE + steps + 2, ignore_eos=True)
    for prompt in prompts:
        engine.add_request(prompt, params)
    for _ in range(_SETTLE):
        engine.step()


def operations(events: Iterable[Event], spans: Sequence[float], read: dict[str, int], ceiling: float) -> list[Row]:
    """Of the average step: each operation's time, share, bytes and percentage of the read bandwidth; longest first.

    spans: seconds of each step. Kernels that overlap count in full, so that shares may add up to more than 100%.
    """
    steps, total = len(spans), sum(spans)
    seconds: dict[str, float] = {}
    calls: dict[str, int] = {}
    ordered = sorted(events, key=lambda event: event.start)
    for event in ordered:
        seconds[event.operation] = seconds.get(event.operation, 0.0) + event.seconds
        calls[event.operation] = calls.get(event.operation, 0) + 1
    seconds[GAPS] = max(0.0, total - _covered(ordered))
    rows = []
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        row: Row = {"operation": name, "us": round(1e6 * spent / steps, 2), "calls": calls.get(name, 0) / steps}
        row["share_percent"] = round(100 * spent / total, 2)
        if name in read and spent:
            row |= {"bytes": read[name], "percent_of_bandwidth": round(100 * read[name] / ceiling / (spent / steps), 1)}
        rows.append(row)
    return rows


def _covered(ordered: Iterable[Event]) -> float:
    """Seconds in which at least one event ran."""
    covered = end = 0.0
    for event in ordered:
        covered += max(0.0, event.start + event.seconds - max(event.start, end))
        end = max(end, event.start + event.seconds)
    return covered


def operation_bytes(
    config: ModelConfig, batch: int, context: float, itemsize: int, distinct: Sequence[float]
) -> dict[str, int]:
    """What each operation of a step must read; both the GPU's operations and the CPU's stages."""
    a, hidden = config.attention, config.hidden_size
    needed = floor(config, batch, context, itemsize, distinct)
    qkv = config.num_layers * hidden * config.qkv_size * itemsize
    output = config.num_layers * hidden * a.num_heads * a.head_dim * itemsize
    router = len(distinct) * hidden * (config.moe.num_experts if config.moe else 0) * itemsize
    return {
        "QKV": qkv,
        "output projection": output,
        "attention": needed.kv,
        "attention with projections": qkv + output + needed.kv,
        "router": router,
        "experts": needed.experts,
        "experts with router": needed.experts + router,
        "head": config.vocab_size * hidden * itemsize,
    }


# ---------------------------------------------------------------------------------------------- CPU


def _on_cpu(engine: Engine, steps: int) -> tuple[list[Event], list[float]]:
    events: list[Event] = []
    spans: list[float] = []
    start = 0.0
    for _ in range(steps):
        began = time.perf_counter()
        marks = trace_step(engine).marks
        spans.append(time.perf_counter() - began)
        events += _stages(marks, start)
        start += spans[-1]
    return events, spans


def _stages(marks: Sequence[Mark], start: float) -> Iterator[Event]:
    """In C a whole MoE block is one call: what its probe says of the router at the end of it belongs to the rest."""
    in_c = not any(mark.stage == "experts" for mark in marks)
    held = 0.0
    for mark in marks:
        if in_c and mark.stage == "router":
            held += mark.seconds
            continue
        name = "moe" if in_c and mark.stage == "combine" else mark.stage
        yield Event(name, _STAGES.get(name, name), mark.layer, start, mark.seconds + held)
        start, held = start + mark.seconds + held, 0.0


# ---------------------------------------------------------------------------------------------- GPU


def _on_gpu(engine: Engine, steps: int) -> tuple[list[Event], list[float]]:
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    found = sorted((e for e in seen.events() if e.device_time_total > 0), key=lambda e: e.time_range.start)
    if not found:
        raise ConfigError("torch's profiler saw no kernel on this GPU; it may need permission to read its counters.")
    first = found[0].time_range.start
    kernels = [Kernel(e.name, 1e-6 * (e.time_range.start - first), 1e-6 * e.device_time_total) for e in found]
    events = [
        Event(kernel.name, operation, layer, kernel.start, kernel.seconds)
        for kernel, (operation, layer) in zip(kernels, operations_of(kernels), strict=True)
    ]
    # The graph's steps follow one another without a mark between them: each is taken to be as long as the average.
    span = max(kernel.start + kernel.seconds for kernel in kernels) / steps
    return events, list(itertools.repeat(span, steps))


def _llm_options(options: ProfileOptions) -> Row:
    longest = options.prompt_len + _SETTLE + options.steps + 2
    return {
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads,
        "seed": options.seed,
        "max_num_seqs": options.batch,
        "max_model_len": longest,
        "max_num_batched_tokens": max(512, options.batch * options.prompt_len),
    }
