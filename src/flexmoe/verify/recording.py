"""Recording: the tensors of one forward pass, by stage and layer. Both sides fill one, so that they can be compared."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Key = tuple[str, int]


class Recording:
    """A Probe that keeps a copy of what it sees, on the CPU and in fp32 (indices stay integers)."""

    def __init__(self, *stages: str) -> None:
        """stages: the ones to keep; none given keeps all."""
        self._stages = frozenset(stages)
        self._tensors: dict[Key, list[Tensor]] = {}

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        if self._stages and stage not in self._stages:
            return
        copy = tensor.detach().reshape(-1, tensor.shape[-1]).to("cpu", copy=True)
        copy = copy.float() if copy.is_floating_point() else copy.long()
        self._tensors.setdefault((stage, layer), []).append(copy)

    def __getitem__(self, key: Key) -> Tensor:
        """[rows, columns] of one stage, all passes one after another."""
        return torch.cat(self._tensors[key])

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[Key]:
        return iter(self._tensors)

    def put(self, stage: str, layer: int, tensor: Tensor) -> None:
        """Keep `tensor` in place of what was recorded."""
        self._tensors[stage, layer] = [tensor]
