"""What a probe sees of a step whose stages add to one tensor. Enters: the residual stream. Leaves: each part."""

from __future__ import annotations

from torch import Tensor

from flexmoe.layers.forward_batch import Probe


class Seen:
    """Shows the probe what a step computes: stages add to the residual stream, which is not kept by itself."""

    def __init__(self, probe: Probe | None, x: Tensor) -> None:
        self.probe, self._x = probe, x
        self._before = x if probe is None else x.clone()

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        """Show a copy of a tensor, which the next layer overwrites."""
        if self.probe is not None:
            self.probe.record(stage, layer, tensor.clone())

    def added(self, stage: str, layer: int) -> None:
        """Show what came to the residual stream since the last call."""
        if self.probe is not None:
            self.probe.record(stage, layer, self._x - self._before)
            self._before = self._x.clone()
