"""Measures one GPU for the planner. Enters: a device and seconds. Leaves: a Machine of one device.

The most telling operations come first; those for which no time is left are not in the table. Decodes are measured
inside a step's graph (`step_operations.py`), prompts by their kernels (`prompt_operations.py`); and both in torch
(`torch_operations.py`), for plans that have neither.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from flexmoe.bench.bandwidth import read_bandwidth
from flexmoe.bench.machine_jobs import Job, Lazy, Notify, run_jobs
from flexmoe.bench.machine_samples import gpu_prompt_samples, prompt_samples, step_samples, torch_decode_samples
from flexmoe.bench.machine_shapes import gpu_shapes, gpu_slices
from flexmoe.bench.peak import matrix_peak
from flexmoe.bench.prompt_operations import PromptLayers
from flexmoe.bench.record import facts
from flexmoe.bench.step_operations import Steps
from flexmoe.bench.torch_operations import TorchLayers
from flexmoe.config.machine import DeviceSpec, Machine, Sample

_BATCHES, _OTHER_BATCHES = (1, 8, 32, 128), (2, 4, 16, 64, 256, 512)
_CONTEXT, _LONG, _LONG_BATCHES = 256, (1024, 4096), (1, 8, 64)
_MOST_KEYS = 2**18  # of all rows together: memory
_PROMPTS, _BEHIND = (64, 256, 512, 1024, 2048, 4096, 8192), 4096
_TORCH_PROMPTS = (64, 512, 2048)
_CHUNKS = 9  # prompts in one step
_RESERVE = 3 * 2**30  # what engine/startup.py leaves free, and the context of CUDA


def measure_gpu(name: str, device: torch.device, seconds: float, notify: Notify) -> Machine:
    """One GPU, within about so many seconds."""
    properties = torch.cuda.get_device_properties(device)
    notify("memory and matrix products")
    spec = DeviceSpec(
        kind="cuda", name=properties.name, memory_bytes=properties.total_memory,
        read_bandwidth=read_bandwidth(device),
        peak_flops={dtype: matrix_peak(device, getattr(torch, dtype)) for dtype in ("bfloat16", "float32")},
        launch_s=_launch_seconds(device), host_s=0.0,
    )  # fmt: skip
    steps: list[float] = []  # what they have beside operations
    launching: list[float] = []
    in_torch: list[tuple[float, float]] = []
    samples = run_jobs(_jobs(device, steps, launching, in_torch), seconds, notify)
    layer, chunk = (statistics.median(times) for times in zip(*(in_torch or [(0.0, 0.0)]), strict=True))
    spec = replace(
        spec, host_s=statistics.median(steps or [0.0]), prompt_layer_s=statistics.median(launching or [0.0]),
        torch_layer_s=layer, torch_chunk_s=max(0.0, chunk),
    )  # fmt: skip
    return Machine(name, 1, 1, spec, samples=tuple(samples), reserve_bytes=_RESERVE, notes=facts(device))


def _jobs(
    device: torch.device, steps: list[float], launching: list[float], in_torch: list[tuple[float, float]]
) -> Iterator[Job]:
    """The most telling first. Models are made when their turn comes, one at a time. Lists: where else times go."""
    for shape in gpu_shapes():
        prompts = _Prompts(
            Lazy(partial(PromptLayers, shape.config, max(_PROMPTS) + _BEHIND, device, torch.bfloat16)), launching
        )
        for rows in _PROMPTS:
            yield f"{shape.name}: prompt of {rows} tokens", partial(prompts.prompt, rows)
        for rows in (64, 512, 2048):
            yield f"{shape.name}: prompt of {rows} behind {_BEHIND} tokens", partial(prompts.prompt, rows, _BEHIND)
    for batches, shapes in ((_BATCHES, gpu_shapes()), (_OTHER_BATCHES, gpu_shapes()), (_BATCHES, gpu_slices())):
        for shape in shapes:
            decodes = _Decodes(Lazy(partial(Steps, shape.config, device)), steps)
            for batch in batches:
                yield f"{shape.name}: decodes of {batch}", partial(decodes.step, batch)
            if batches is _BATCHES:
                yield f"{shape.name}: long contexts", decodes.long
    for shape in gpu_shapes():
        torch_prompts = _TorchPrompts(Lazy(partial(TorchLayers, shape.config, torch.bfloat16, device)), in_torch)
        for rows in _TORCH_PROMPTS:
            yield f"{shape.name}: prompt of {rows} tokens in torch", partial(torch_prompts.prompt, rows)
        yield f"{shape.name}: decodes in torch", partial(torch_prompts.decode, 32)


@dataclass(frozen=True, slots=True)
class _Prompts:
    """Prompts of one model. launching: seconds of a layer's launches."""

    layers: Lazy[PromptLayers]
    launching: list[float]

    def prompt(self, rows: int, before: int = 0) -> list[Sample]:
        layers = self.layers()
        took = layers.parts(rows, before)
        self.launching.append(took["host"])
        return gpu_prompt_samples(layers.config, took, rows, before)


@dataclass(frozen=True, slots=True)
class _TorchPrompts:
    """The same through torch's modules. launching: seconds of a layer's launches, and of each prompt more."""

    layers: Lazy[TorchLayers]
    launching: list[tuple[float, float]]

    def prompt(self, rows: int) -> list[Sample]:
        alone, many = (self.layers().host_seconds(chunks) for chunks in (1, _CHUNKS))
        self.launching.append((alone, (many - alone) / (_CHUNKS - 1)))
        return prompt_samples(self.layers(), rows)

    def decode(self, rows: int) -> list[Sample]:
        return torch_decode_samples(self.layers(), rows, _CONTEXT)


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Decode steps of one model. rest: seconds of a step beside its operations."""

    steps: Lazy[Steps]
    rest: list[float]

    def step(self, batch: int) -> list[Sample]:
        steps = self.steps()
        steps.prepare(batch, _CONTEXT)
        added = steps.added()
        self.rest.append(added["rest"])
        return step_samples(steps.config, added, batch, _CONTEXT)

    def long(self) -> list[Sample]:
        steps, found = self.steps(), []
        for context, batch in itertools.product(_LONG, _LONG_BATCHES):
            if batch * context <= _MOST_KEYS:
                steps.prepare(batch, context)
                found += step_samples(steps.config, steps.added("decode_attention"), batch, context)
        return found


def _launch_seconds(device: torch.device, count: int = 200) -> float:
    """Of a kernel in a graph that has next to nothing to do, one after the other."""
    x, graph = torch.zeros(16, device=device), torch.cuda.CUDAGraph()
    x.add_(1)
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        for _ in range(count):
            x.add_(1)
    return min(_device_seconds(graph.replay) for _ in range(5)) / count


def _device_seconds(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3
