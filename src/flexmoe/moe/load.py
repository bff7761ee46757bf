"""ExpertCounter: counts the choices of experts where they are made. Enters: topk_ids. Leaves: LayerLoads."""

from __future__ import annotations

import torch
from torch import Tensor

from flexmoe.config.model import ModelConfig
from flexmoe.config.routing import LayerLoad


class ExpertCounter:
    """A Probe that adds up, on the device and without waiting for it, how many tokens chose each expert.

    Its memory is two numbers for each layer and expert, however long it counts: counts and active, int64 [L, E], L
    layers with experts. Of a decode step `DeviceDecoder.count` adds to them, and its rows are reported to `passed`.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        """config: of a model with experts."""
        assert config.moe is not None, "a model without experts has nothing to count"
        self._moe, self._device = config.moe, device
        layers = [number for number, layer in enumerate(config.layers) if layer.is_moe]
        self._row = {layer: row for row, layer in enumerate(layers)}
        self.counts = torch.zeros(len(layers), config.moe.num_experts, dtype=torch.int64, device=device)
        self.active = torch.zeros_like(self.counts)
        self._passes, self._tokens = [0] * len(layers), [0] * len(layers)

    def reset(self) -> None:
        """Start anew."""
        self.counts.zero_()
        self.active.zero_()
        self._passes, self._tokens = [0] * len(self._row), [0] * len(self._row)

    def passed(self, rows: int) -> None:
        """The choices of a step of so many rows, in all layers, were added to the tensors."""
        self._passes = [passes + 1 for passes in self._passes]
        self._tokens = [tokens + rows for tokens in self._tokens]

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        """Count the choices topk_ids [T, K] of a layer; other stages are passed over."""
        if stage != "topk_ids" or not len(tensor):  # an idle data rank makes no pass
            return
        row = self._row[layer]
        ids = tensor.reshape(-1).long()
        counts = torch.zeros(self._moe.num_experts, dtype=torch.int64, device=self._device)
        counts.scatter_add_(0, ids, torch.ones_like(ids))  # bincount would make the host wait
        self.counts[row] += counts
        self.active[row] += counts > 0
        self._passes[row] += 1
        self._tokens[row] += tensor.shape[0]

    def loads(self, model: str) -> list[LayerLoad]:
        """What was counted so far. model: the name to record it under."""
        counts, active = self.counts.tolist(), self.active.tolist()
        return [
            LayerLoad(
                model,
                layer,
                self._moe.top_k,
                tuple(counts[row]),
                self._passes[row],
                self._tokens[row],
                tuple(active[row]),
            )
            for layer, row in self._row.items()
        ]
