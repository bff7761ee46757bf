"""Steps of prompts on a GPU: short ones as CUDA graphs. Enters: chunks. Leaves: logits of those that sample.

A step of a few hundred tokens takes a GPU less time than a host needs to launch its hundreds of kernels. So such steps
are padded to one of few forms, whose launches are recorded when a form comes for the second time. Longer ones are
launched kernel by kernel: the host is through before the GPU is. Ranks meet the same forms in the same order, so they
also record together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexmoe.engine.cuda_graph import Captured, GraphPool
from flexmoe.engine.prompt_inputs import PromptInputs
from flexmoe.engine.prompt_rows import PromptForm, lay_out, num_tables, pack
from flexmoe.layers.forward_batch import Probe
from flexmoe.layers.kv_cache import KVCache
from flexmoe.models.device_rows import DevicePrompts, PromptRows
from flexmoe.parallel.comm import Traffic
from flexmoe.scheduling.prompt_forms import MOST_CHUNKS, MOST_GRAPHED, graph_form
from flexmoe.scheduling.step import ScheduledChunk

_MOST_TABLES = 2**18  # blocks of all chunks


def form_of(chunks: Sequence[ScheduledChunk], block_rows: int, most: int = MOST_GRAPHED) -> PromptForm | None:
    """The form that a step is padded to if it is to be a graph; None if it is too large for one."""
    found = graph_form(sum(chunk.num_tokens for chunk in chunks), len(chunks), most)
    return None if found is None else _padded(*found, block_rows)


def _padded(rows: int, count: int, block_rows: int) -> PromptForm:
    # A span more, an empty one, for blocks of padding; a block more a chunk, since each may end within one.
    return PromptForm(rows, count + 1, count, rows // block_rows + count, padded=True)


class GraphedPrompts:
    """Computes steps of prompts by a DevicePrompts on one cache."""

    def __init__(
        self,
        model: DevicePrompts,
        cache: KVCache,
        device: torch.device,
        traffic: Traffic | None = None,
        *,
        most_graphed: int,
    ) -> None:
        """most_graphed: steps of up to so many tokens are graphs; with 0, as must be where tokens travel, all are
        launched kernel by kernel, without padding. traffic: where the model's collectives are counted.
        """
        self.hopper = model.hopper
        self._model, self._cache, self._device, self._most = model, cache, device, most_graphed
        room = _most_inputs(most_graphed, model.block_rows) if most_graphed else 0
        self._inputs = PromptInputs(room, MOST_CHUNKS, device) if room else None
        self._outputs: Tensor | None = None  # logits, of one graph at a time; none on ranks that do not sample
        self._tokens = torch.zeros(MOST_CHUNKS, dtype=torch.int64, device=device)
        self.likeliest: Tensor | None = None  # int64 [N], of the latest logits the likeliest tokens, if it has a form
        self._pool = GraphPool(device, traffic) if most_graphed else None
        self._rows: dict[PromptForm, PromptRows] = {}  # views of the inputs
        self._graphs: dict[PromptForm, Captured | None] = {}  # None: came once

    @torch.inference_mode()
    def logits(
        self, chunks: Sequence[ScheduledChunk], before: Tensor | None = None, probe: Probe | None = None,
        most_rows: int | None = None,
    ) -> Tensor:  # fmt: skip
        """[N, V] of the N chunks that sample, in the model's dtype, until the next call; writes keys and values.

        before: int64, the tokens of the first chunks, decodes, that only the device knows; -1 for one that the host
        does. probe: sees the step without padding, so it is no graph. most_rows: see `DevicePrompts`.
        """
        inputs, self.likeliest = self._inputs, None
        if not chunks:
            return self._model.assist(most_rows)
        block_rows, block_size = self._model.block_rows, self._cache.block_size
        samples = sum([chunk.samples for chunk in chunks])
        form = None if inputs is None or probe is not None else form_of(chunks, block_rows, self._most)
        if inputs is None or form is None or form.head + num_tables(chunks) > len(inputs.numbers):
            rows = lay_out(chunks, block_size, block_rows, self._device)
            _fill_in(rows, before)
            logits = self._model.logits(rows, self._cache, probe, most_rows)
        else:
            inputs.write(pack(chunks, form, block_rows), before)
            logits = self._run(form, inputs)[:samples]
            self.likeliest = self._tokens[: len(logits)]  # none on ranks that do not sample
        return logits[:samples]

    @torch.inference_mode()
    def record(self, tokens: int, chunks: int) -> Tensor:
        """The graph of the form, one of `forms_up_to`, unless it is there; by steps of padding alone.

        Logits of nothing, [chunks, V].
        """
        assert self._inputs is not None
        form = _padded(tokens, chunks, self._model.block_rows)
        numbers = pack((), form, self._model.block_rows)
        while True:
            self._inputs.write(numbers)
            logits = self._run(form, self._inputs)
            if self._graphs[form] is not None:
                return logits

    def _run(self, form: PromptForm, inputs: PromptInputs) -> Tensor:
        """Logits of the form's samples, from what was written to the inputs."""
        logits = self._launch(form, inputs)
        inputs.launched()
        return logits

    def _launch(self, form: PromptForm, inputs: PromptInputs) -> Tensor:
        if (rows := self._rows.get(form)) is None:
            rows = self._rows[form] = form.rows_of(inputs.numbers, self._model.block_rows, self._cache.block_size)
        if form not in self._graphs:
            # The first time without a graph: that compiles kernels, and many a form never comes again.
            inputs.fetch()
            logits = self._model.logits(rows, self._cache)
            if self._outputs is None:
                self._outputs = logits.new_empty(MOST_CHUNKS * bool(len(logits)), logits.shape[1])
            outputs = self._keep(logits, form)
            self._graphs[form] = None
            return outputs
        assert self._pool is not None
        if (graph := self._graphs[form]) is None:

            def compute() -> None:
                inputs.fetch()
                self._keep(self._model.logits(rows, self._cache), form)

            graph = self._graphs[form] = self._pool.capture(compute)
        graph.replay()
        assert self._outputs is not None
        return self._outputs[: form.samples]

    def _keep(self, logits: Tensor, form: PromptForm) -> Tensor:
        """The logits where graphs leave them; what is likeliest by them, too."""
        assert self._outputs is not None
        outputs = self._outputs[: form.samples]
        outputs.copy_(logits)
        self._model.choose(outputs, self._tokens[: len(outputs)])
        return outputs


def _fill_in(rows: PromptRows, before: Tensor | None) -> None:
    """The tokens of the first rows, decodes, that only the device knows; -1 where the host does."""
    if before is not None:
        decodes = rows.token_ids[: len(before)]
        decodes.copy_(torch.where(before >= 0, before, decodes))


def _most_inputs(tokens: int, block_rows: int) -> int:
    """Numbers in the buffer of the largest form, of so many tokens, tables included."""
    return _padded(tokens, MOST_CHUNKS, block_rows).head + _MOST_TABLES
