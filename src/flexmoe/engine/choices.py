"""Which experts the sampled rows of a pass took. Enters: topk_ids and topk_weights. Leaves: a TokenRouting a row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flexmoe.engine.outputs import TokenRouting
from flexmoe.engine.sampler import SampleOutput
from flexmoe.engine.sampling_state import SamplingState
from flexmoe.layers.forward_batch import Probe
from flexmoe.scheduling.step import Step


class ChoiceTap:
    """A Probe of one pass: keeps the choices of the rows that sample, on their device, and hands all on to another.

    Only requests that ask for it make a pass tapped: like any probe it keeps the step out of CUDA graphs, and makes the
    C kernels stop after each part of a layer.
    """

    def __init__(self, step: Step, states: Sequence[SamplingState], following: Probe | None) -> None:
        """step, states: of the pass. following: who else looks into the steps."""
        ends = itertools.accumulate(chunk.num_tokens for chunk in step.chunks)
        self._rows = [end - 1 for chunk, end in zip(step.chunks, ends, strict=True) if chunk.samples]
        self._wanted = [state.wants_routing for state in states]
        self._following = following
        self._index: Tensor | None = None
        self._kept: dict[str, dict[int, Tensor]] = {"topk_ids": {}, "topk_weights": {}}

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        """Copy the rows that sample of topk_ids and topk_weights, both [T, K]."""
        if self._following is not None:
            self._following.record(stage, layer, tensor)
        if stage in self._kept:
            if self._index is None:
                self._index = torch.tensor(self._rows, device=tensor.device)
            self._kept[stage][layer] = tensor.index_select(0, self._index)

    def annotate(self, sampled: SampleOutput) -> SampleOutput:
        """The pass's tokens, with the routing of those that asked for it."""
        layers = tuple(self._kept["topk_ids"])
        ids, weights = (torch.stack(list(kept.values()), 1).tolist() for kept in self._kept.values())  # [N, L, K]
        routing = [
            TokenRouting(layers, tuple(map(tuple, experts)), tuple(map(tuple, shares))) if wanted else None
            for wanted, experts, shares in zip(self._wanted, ids, weights, strict=True)
        ]
        return replace(sampled, routing=routing)
