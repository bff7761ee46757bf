"""Operations as several ranks of one CPU compute them at once. Enters: how many, their threads. Leaves: samples.

Ranks are processes of this module. They begin each shape together; a figure is of the slowest.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, MutableSequence, Sequence
from dataclasses import replace
from typing import Any

import torch

from flexmoe.bench.machine_samples import prompt_samples, torch_decode_samples
from flexmoe.bench.machine_shapes import Shape, cpu_shapes, cpu_slices
from flexmoe.bench.torch_operations import TorchLayers
from flexmoe.config.machine import Sample
from flexmoe.parallel.launch import spawn
from flexmoe.parallel.rank import Setup, main
from flexmoe.parallel.supervisor import Supervisor

_TIMEOUT = 120.0
_PROMPTS, _DECODES, _CONTEXT = (16, 64, 512), (1, 8, 32), 64


class Rank:
    """Measures shapes as they are told to all ranks."""

    def __init__(self, setup: Setup, beats: MutableSequence[int]) -> None:
        self._ranks = setup.size

    def handle(self, command: str, payload: Any) -> list[Sample]:
        """The only command is to measure a shape with so many threads."""
        assert command == "measure"
        index, threads = payload
        torch.set_num_threads(threads)
        layers = TorchLayers(_shapes(self._ranks)[index].config, torch.float32, torch.device("cpu"))
        found = [sample for rows in _PROMPTS for sample in prompt_samples(layers, rows, ranks=self._ranks)]
        for rows in _DECODES:
            found += torch_decode_samples(layers, rows, _CONTEXT, self._ranks)
        return found

    def close(self) -> None:
        """Nothing is held."""


def run() -> None:
    """The program of a rank."""
    main(Rank, sys.argv[1:])


def rank_samples(ranks: int, threads: int) -> list[Sample]:
    """Of the slowest rank, shape by shape."""
    supervisor = Supervisor(spawn(__name__, ranks, _TIMEOUT), _TIMEOUT, str)
    found: list[Sample] = []
    try:
        for index in range(len(_shapes(ranks))):
            number = supervisor.post("measure", (index, threads), "measuring", owed=range(ranks), patient=True)
            found += slowest(supervisor.wait(number).values())
    finally:
        supervisor.close()
    return found


def slowest(by_rank: Collection[Sequence[Sample]]) -> list[Sample]:
    """Of each operation the longest time. One that some rank lost in noise was measured by none."""
    alike: dict[Sample, list[float]] = {}
    for samples in by_rank:
        for sample in samples:
            alike.setdefault(replace(sample, seconds=0.0), []).append(sample.seconds)
    return [replace(same, seconds=max(each)) for same, each in alike.items() if len(each) % len(by_rank) == 0]


def _shapes(ranks: int) -> list[Shape]:
    """Whole layers and the shares of a rank."""
    return [*cpu_shapes()[:2], *cpu_slices(ranks)]
