"""Measures a CPU for the planner. Enters: ranks and seconds. Leaves: a Machine of one node.

Decodes are measured in the C kernels (`native_operations.py`), twice with other measurements between, lest a moment in
which the machine had other work counts; prompts in torch (`torch_operations.py`); and both in torch as ranks compute
them, all at once, each on its share of the cores (`machine_ranks.py`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import fmean

import torch

from flexmoe.bench.bandwidth import read_bandwidth
from flexmoe.bench.collectives import measured_links, rank_counts
from flexmoe.bench.machine_jobs import Job, Lazy, Made, Notify, run_jobs
from flexmoe.bench.machine_ranks import rank_samples
from flexmoe.bench.machine_samples import native_attention, native_samples, prompt_samples
from flexmoe.bench.machine_shapes import Shape, builtin_shape, cpu_shapes
from flexmoe.bench.native_operations import NativeLayers
from flexmoe.bench.peak import matrix_peak
from flexmoe.bench.record import facts
from flexmoe.bench.torch_operations import TorchLayers
from flexmoe.config.machine import DeviceSpec, Link, Machine, Sample
from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.device import set_threads
from flexmoe.kernels.cpu import library
from flexmoe.llm import LLM
from flexmoe.models.native import most_rows

_CPU = torch.device("cpu")
_DTYPES = (torch.float32, torch.bfloat16)
_BATCHES, _CONTEXT = (1, 2, 4, 8, 16, 32), 128
_LONG = ((1, 512), (1, 4096), (8, 1024))  # rows and keys
_PROMPTS = ((16, 0), (128, 0), (512, 0), (256, 1024), (2048, 0))  # tokens, and those before them
_STEPS = 32
_RESERVE = 2**30
_LINK = Link("memory", 0, 3e-4, 2e9)  # where ranks were not measured


def measure_cpu(name: str, ranks: int, seconds: float, notify: Notify) -> Machine:
    """This machine's processors. seconds: for operations; some more go to the speed of memory, and to ranks."""
    cores = set_threads(None)
    notify("memory and matrix products")
    spec = DeviceSpec(
        kind="cpu", name=str(facts(_CPU)["device"]["name"]),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), read_bandwidth=read_bandwidth(_CPU),
        peak_flops={str(dtype).removeprefix("torch."): matrix_peak(_CPU, dtype) for dtype in _DTYPES},
        launch_s=_launch_seconds(), host_s=0.0, cores=cores,
    )  # fmt: skip
    notify("what a step takes beside its operations")
    step, row = _host_seconds(cores)
    spec = replace(spec, host_s=step, host_row_s=row)
    links: tuple[Link, ...] = (_LINK,)
    samples = merged(run_jobs(_jobs(cores), seconds, notify))
    if ranks > 1:
        links = measured_links(ranks, "cpu", notify)
        for count in rank_counts(ranks):
            notify(f"operations of {count} ranks at once")
            samples += rank_samples(count, max(1, cores // count))
    guessed = () if ranks > 1 else ("exchanges among ranks",)
    return Machine(
        name, cores, 1, spec, links, tuple(samples), reserve_bytes=_RESERVE, extrapolated=guessed, notes=facts(_CPU)
    )


def _jobs(cores: int) -> Iterator[Job]:
    """The most telling first: in each dtype decodes of all shapes, then prompts."""
    native = not library.load("auto").reason
    for dtype in _DTYPES:
        for shape in cpu_shapes() if native else ():
            yield from _decodes(shape, dtype, cores)
        for shape in cpu_shapes():
            yield from _prompts(shape, dtype, cores if native else None)


def _decodes(shape: Shape, dtype: torch.dtype, cores: int) -> Iterator[Job]:
    """In the C kernels, for as many rows as the engine gives them. The model is made when its turn comes."""
    what, layers = _name(shape, dtype), Lazy(partial(NativeLayers, shape.config, dtype, cores))
    for turn, rows in product(("", ", again"), (n for n in _BATCHES if n <= most_rows(shape.config, dtype))):
        yield f"{what}: decodes of {rows}{turn}", partial(_measure, native_samples, layers, rows, _CONTEXT)
    for rows, keys in _LONG:
        yield f"{what}: {rows} x {keys} keys", partial(_measure, native_attention, layers, rows, keys)


def _prompts(shape: Shape, dtype: torch.dtype, native_threads: int | None) -> Iterator[Job]:
    what = _name(shape, dtype)
    layers = Lazy(partial(TorchLayers, shape.config, dtype, _CPU, native_threads=native_threads))
    for rows, before in _PROMPTS:
        prompt = f"{what}: prompt of {rows} tokens behind {before}"
        yield prompt, partial(_measure, prompt_samples, layers, rows, before)


def merged(samples: Iterable[Sample]) -> list[Sample]:
    """Of those that measured the same the quickest, in the order of the first; of attention, a difference, the mean:
    the smallest of several differences is the one that noise made small.
    """
    found: dict[tuple[object, ...], list[Sample]] = {}
    for sample in samples:
        found.setdefault((sample.op, sample.dtype, sample.rows, sample.shape, sample.ranks), []).append(sample)
    return [_merged([sample.seconds for sample in alike], alike[0]) for alike in found.values()]


def _merged(seconds: list[float], sample: Sample) -> Sample:
    return replace(sample, seconds=fmean(seconds) if sample.op == "fused.attention" else min(seconds))


def _name(shape: Shape, dtype: torch.dtype) -> str:
    return f"{shape.name}, {str(dtype).removeprefix('torch.')}"


def _measure(how: Callable[[Made, int, int], list[Sample]], layers: Lazy[Made], rows: int, keys: int) -> list[Sample]:
    return how(layers(), rows, keys)


def _host_seconds(cores: int) -> tuple[float, float]:
    """Of a step and of each of its rows: what the built-in model's steps take beside the C kernels."""
    prompts = [[1 + row] * 16 for row in range(8)]
    took = {}
    with LLM(device="cpu", dtype="float32", threads=cores, enable_prefix_caching=False) as llm:
        for rows in (1, 8):
            times = [min(_generate(llm, prompts[:rows], tokens) for _ in range(3)) for tokens in (1, 1 + _STEPS)]
            took[rows] = (times[1] - times[0]) / _STEPS
    if not library.load("auto").reason:
        layers = NativeLayers(builtin_shape().config, torch.float32, cores)
        took = {rows: seconds - layers.whole(rows, 16 + _STEPS // 2) for rows, seconds in took.items()}
    each = max(0.0, (took[8] - took[1]) / 7)
    return max(0.0, took[1] - each), each


def _generate(llm: LLM, prompts: list[list[int]], tokens: int) -> float:
    start = time.perf_counter()
    llm.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))
    return time.perf_counter() - start


def _launch_seconds() -> float:
    """Of an operation of torch that has next to nothing to do."""
    x = torch.zeros(16)
    return sorted(_seconds(partial(x.add_, 1)) for _ in range(200))[100]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
