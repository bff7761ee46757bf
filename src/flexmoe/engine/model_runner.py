"""ModelRunner: one step on the device. Enters: a Step and the samplers' states. Leaves: sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexmoe.engine.batch import build_batch
from flexmoe.engine.sampler import SampleOutput, Sampler, SamplingState
from flexmoe.layers.forward_batch import Probe
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder
from flexmoe.scheduling.scheduler import Step


class ModelRunner:
    """Owns the model and its KV cache; holds no request."""

    def __init__(self, model: Decoder, cache: KVCache, device: torch.device) -> None:
        self.model, self.cache, self.device = model, cache, device
        self.probe: Probe | None = None  # sees every tensor of the following steps; see `flexmoe trace`
        self._sampler = Sampler()
        self._windows = sorted({layer.window for layer in model.config.layers}, key=lambda w: w or 0)

    @torch.inference_mode()
    def run(self, step: Step, states: Sequence[SamplingState]) -> SampleOutput:
        """Compute the step's rows, write their keys and values, sample where a chunk asks for it.

        states: one for each chunk that samples, in order.
        """
        batch = build_batch(step, self.cache.block_size, self._windows, self.device, self.probe)
        hidden = self.model(batch, self.cache)
        if not states:
            return SampleOutput([], [])
        return self._sampler.sample(self.model.logits(hidden, batch), states)
