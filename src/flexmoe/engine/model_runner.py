"""ModelRunner: one step on the device. Enters: a Step and the samplers' states. Leaves: sampled tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from flexmoe.engine.batch import build_batch, build_paged_rows
from flexmoe.engine.sampler import SampleOutput, Sampler, SamplingState
from flexmoe.layers.forward_batch import Probe
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.decoder import Decoder
from flexmoe.models.native import MAX_ROWS
from flexmoe.scheduling.scheduler import Step


class ModelRunner:
    """Owns the model and its KV cache; holds no request."""

    def __init__(self, model: Decoder, cache: KVCache, device: torch.device) -> None:
        self.model, self.cache, self.device = model, cache, device
        self.probe: Probe | None = None  # sees every tensor of the following steps; see `flexmoe trace`
        self._sampler = Sampler()
        self._windows = sorted({layer.window for layer in model.config.layers}, key=lambda w: w or 0)

    def run(self, step: Step, states: Sequence[SamplingState]) -> SampleOutput:
        """Compute the step's rows, write their keys and values, sample where a chunk asks for it.

        states: one for each chunk that samples, in order.
        """
        native = self.model.native
        if native is None or step.num_decodes != len(step.chunks) or len(step.chunks) > MAX_ROWS:
            return self._run(step, states)
        with _one_torch_thread(), torch.inference_mode():
            logits = native(build_paged_rows(step, self.cache.block_size), self.cache, self.probe)
            return self._sampler.sample(logits, states)

    @torch.inference_mode()
    def _run(self, step: Step, states: Sequence[SamplingState]) -> SampleOutput:
        batch = build_batch(step, self.cache.block_size, self._windows, self.device, self.probe)
        hidden = self.model(batch, self.cache)
        if not states:
            return SampleOutput([], [])
        return self._sampler.sample(self.model.logits(hidden, batch), states)


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Keep torch's threads out of a step of the C kernels: after any work they spin for a while on the cores that the
    C threads need. Measured: 6 ms instead of 1 for a step of 8 rows, from one parallel argmax.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
