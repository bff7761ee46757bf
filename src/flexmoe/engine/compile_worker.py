"""A process that compiles what an engine's steps on a GPU will launch: `python -m flexmoe.engine.compile_worker`.

Enters, as a line of JSON on stdin: a `Job` and this worker's number. Leaves: kernels in Triton's cache on disk, where
the engine finds them when a step first needs one. The model here has a few layers of each kind and no weights: its
tensors are memory that nobody touches. Ends when stdin does, so no later than the engine.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.powers import power_of_two
from flexmoe.engine.cuda_graph import buckets_up_to
from flexmoe.engine.packed_rows import PackedRows
from flexmoe.engine.prompt_inputs import PromptInputs
from flexmoe.engine.prompt_rows import PromptForm
from flexmoe.kernels import gpu
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder
from flexmoe.models.device_rows import PDL_CAPABILITY, Sampling
from flexmoe.models.families import read_config
from flexmoe.models.hopper import imagined_kernels
from flexmoe.moe.load import ExpertCounter
from flexmoe.scheduling.prompt_forms import MOST_CHUNKS, MOST_GRAPHED, forms_up_to

_CPU = torch.device("cpu")
_FEW = 4  # rows of the steps that come first
_ALIKE = 4  # layers of a kind: in that many every alignment of a layer's part of a shared buffer has come up
_DIVISOR = 16  # Triton compiles numbers that it divides apart from others
_GROWTH = 1.04  # between sizes of steps: tiles serve larger ranges
_INEXACT = 1 / 3  # in bf16 and fp16
_NICE = 15  # below everything that somebody waits for


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be compiled, and for which GPU. shared: bytes of memory that a block may take there.

    rows: of a decode step, at most. tokens: of a step with prompts, at most. exact_router: the routers' weights lose
    nothing in dtype; kernels read fp32 ones where they would. attends, multiplies: kernels for Hopper compute attention
    of prompts, and experts with many rows.
    """

    hf_config: dict[str, Any]
    dtype: str
    gpu: str
    capability: tuple[int, int]
    shared: int
    block_size: int
    max_position: int
    rows: int
    tokens: int
    exact_router: bool = True
    attends: bool = False
    multiplies: bool = False

    @staticmethod
    def read(made: dict[str, Any]) -> Job:
        """From what `asdict` gave, through JSON."""
        return Job(**(made | {"capability": tuple(made["capability"])}))

    def line(self, number: int, workers: int, done: Path | None) -> str:
        """For the stdin of worker `number`, which makes the file `done` when it has come to its end."""
        order = {"job": asdict(self), "number": number, "workers": workers, "done": done and str(done)}
        return json.dumps(order) + "\n"


class WithoutProducts(TorchFunctionMode):
    """Torch's products, which need no compiling, leave what nobody computed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            x, weight = args[:2]
            return x.new_empty(*x.shape[:-1], len(weight))
        if func is torch.mm and kwargs and "out" in kwargs:
            return kwargs["out"]
        return func(*args, **(kwargs or {}))


def compile_all(job: Job) -> None:
    """Launch all that steps launch, the most usual first."""
    config = _few_layers_of_each(read_config(job.hf_config))
    dtype: torch.dtype = getattr(torch, job.dtype)
    gpu.assume(job.shared, job.capability)
    with WithoutProducts(), torch.inference_mode():
        model = Decoder(config, ParallelPlan(), "reference", job.max_position, dtype=dtype, device=_CPU).eval()
        for layer in model.decoder_layers:
            if layer.moe is not None:
                layer.moe.router.weight.data.fill_(0.0 if job.exact_router else _INEXACT)
        model.pack(in_place=True)
        cache = KVCache(config, 1, job.block_size, dtype, _CPU)
        decodes = _Decodes(job, model, cache)
        prompts = _Prompts(job, model, cache)
        few = [rows for rows in buckets_up_to(job.rows) if rows <= _FEW]
        for rows in few:
            decodes.step(rows)
        for tokens in _graphed(job.tokens):
            prompts.step(tokens, padded=True)
        for samples in _powers_of_two(min(job.rows, MOST_CHUNKS)):
            prompts.step(MOST_CHUNKS, samples, padded=True)
        for rows in buckets_up_to(job.rows)[len(few) :]:
            decodes.step(rows)
        for rows in buckets_up_to(job.rows):
            decodes.variants(rows)
        for tokens in _not_graphed(job.tokens, config.moe.top_k if config.moe is not None else 1):
            prompts.step(tokens, padded=False)
        for samples in _powers_of_two(job.rows):
            prompts.step(MOST_GRAPHED + _DIVISOR, samples, padded=False)


def _few_layers_of_each(config: ModelConfig) -> ModelConfig:
    """With the first ones of each kind: a layer may find its rows normed by the one before."""
    layers = config.layers
    few = tuple(layer for i, layer in enumerate(layers) if layers[:i].count(layer) < _ALIKE)
    return replace(config, layers=few)


def _not_graphed(most: int, top_k: int) -> Iterator[int]:
    """Tokens of steps with prompts that are no graphs.

    Near each size one that 16 divides, one of which it divides the choices, and one of which it divides neither.
    """
    size = MOST_GRAPHED + 1
    while size < most + _DIVISOR:
        whole = min(size, most) // _DIVISOR * _DIVISOR
        near = (whole, whole + _DIVISOR // math.gcd(_DIVISOR, top_k), whole + 1)
        yield from (tokens for tokens in near if MOST_GRAPHED < tokens <= most)
        size = int(size * _GROWTH)


def _powers_of_two(most: int) -> Iterator[int]:
    """Up to the first that is not below `most`."""
    return (1 << power for power in range(power_of_two(most).bit_length()))


def _graphed(tokens: int) -> Iterator[int]:
    """Tokens of the forms that steps are padded to."""
    return (rows for rows, _ in forms_up_to(tokens, (1,)))


class _Decodes:
    """Decode steps."""

    def __init__(self, job: Job, model: Decoder, cache: KVCache) -> None:
        from flexmoe.kernels.triton.tiles import tiles_of
        from flexmoe.models.fused import FusedDecoder

        pdl = job.capability >= PDL_CAPABILITY
        self._cache = cache
        hopper = imagined_kernels(job.attends, job.multiplies)
        self._model = FusedDecoder(model, job.max_position, _CPU, tiles_of(job.gpu), job.rows, pdl=pdl, hopper=hopper)
        self._counter = ExpertCounter(model.config, _CPU) if model.config.moe is not None else None

    def step(self, rows: int, *, draws: bool = False, filtered: bool = False, long: bool = False) -> None:
        """A greedy one, or one that draws."""
        packed = PackedRows(rows, 1, _CPU)
        sampling = Sampling(packed.sampling, filtered) if draws else None
        self._model.step(packed.rows, sampling, self._cache, long=long)

    def variants(self, rows: int) -> None:
        """Steps that draw, among few tokens and among all, that count choices, and that look far back."""
        self.step(rows, draws=True)
        self.step(rows, draws=True, filtered=True)
        self.step(rows, long=True)
        if self._counter is not None:
            self._model.count(rows, self._counter)


class _Prompts:
    """Steps with prompts."""

    def __init__(self, job: Job, model: Decoder, cache: KVCache) -> None:
        from flexmoe.kernels.triton.tiles import tiles_of
        from flexmoe.models.fused_prompts import PromptDecoder

        pdl, tiles = job.capability >= PDL_CAPABILITY, tiles_of(job.gpu)
        hopper = imagined_kernels(job.attends, job.multiplies)
        self._model = PromptDecoder(model, job.max_position, _CPU, tiles, pdl=pdl, hopper=hopper)
        self._cache = cache
        PromptInputs(1, 1, _CPU).fetch()

    def step(self, tokens: int, samples: int = 1, *, padded: bool) -> None:
        """One prompt of so many tokens, and so many rows whose logits are wanted."""
        form = PromptForm(tokens, 2, samples, tokens // self._model.block_rows + 1, padded=padded)
        flat = torch.zeros(form.head + 1, dtype=torch.int32)
        rows = form.rows_of(flat, self._model.block_rows, self._cache.block_size)
        logits = self._model.logits(rows, self._cache)
        if padded:
            self._model.choose(logits, torch.zeros(len(logits), dtype=torch.int64))


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)


def main() -> None:
    """One worker."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    os.nice(_NICE)
    torch.set_num_threads(1)
    from flexmoe.kernels.triton.compile_only import compile_only

    job, number, workers = Job.read(order["job"]), order["number"], order["workers"]
    compile_only(job.capability, lambda name: zlib.crc32(name.encode()) % workers == number)
    compile_all(job)
    if order["done"]:
        Path(order["done"]).parent.mkdir(parents=True, exist_ok=True)
        Path(order["done"]).touch()


if __name__ == "__main__":
    main()
