"""ExpertCounter: counts the choices of experts where they are made. Enters: topk_ids. Leaves: LayerLoads."""

from __future__ import annotations

import torch
from torch import Tensor

from flexmoe.config.model import ModelConfig
from flexmoe.config.routing import LayerLoad


class ExpertCounter:
    """A Probe that adds up, on the device and without waiting for it, how many tokens chose each expert.

    Its memory is two numbers for each layer and expert, however long it counts.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        """config: of a model with experts."""
        assert config.moe is not None, "a model without experts has nothing to count"
        self._moe, self._device = config.moe, device
        layers = [number for number, layer in enumerate(config.layers) if layer.is_moe]
        self._row = {layer: row for row, layer in enumerate(layers)}
        self._counts = torch.zeros(len(layers), config.moe.num_experts, dtype=torch.int64, device=device)
        self._active = torch.zeros_like(self._counts)
        self._passes, self._tokens = [0] * len(layers), [0] * len(layers)

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        """Count the choices topk_ids [T, K] of a layer; other stages are passed over."""
        if stage != "topk_ids" or not len(tensor):  # an idle data rank makes no pass
            return
        row = self._row[layer]
        ids = tensor.reshape(-1).long()
        counts = torch.zeros(self._moe.num_experts, dtype=torch.int64, device=self._device)
        counts.scatter_add_(0, ids, torch.ones_like(ids))  # bincount would make the host wait
        self._counts[row] += counts
        self._active[row] += counts > 0
        self._passes[row] += 1
        self._tokens[row] += tensor.shape[0]

    def loads(self, model: str) -> list[LayerLoad]:
        """What was counted so far. model: the name to record it under."""
        counts, active = self._counts.tolist(), self._active.tolist()
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
