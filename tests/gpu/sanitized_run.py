"""Prompts and decode steps of tiny models, kernel by kernel: what `test_sanitizer.py` runs under compute-sanitizer."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from flexmoe.engine.prompt_graphs import GraphedPrompts
from tests.gpu.hopper_prompts import Steps
from tests.gpu.test_cuda_graph import DRAWN, GREEDY, make, without_graphs

PROMPTS = [list(range(3, 20)), *([11 + i, 7, 5] for i in range(40))]
BATCHES = (1, 3, 8, 41)  # both ways of the experts, and buckets with padded rows


def _without_graph(self: GraphedPrompts, form: Any, inputs: Any) -> Tensor:
    """A padded step, which cannot be captured where each tensor is allocated by itself."""
    inputs.fetch()
    rows = form.rows_of(inputs.numbers, self._model.block_rows, self._cache.block_size)
    logits = self._model.logits(rows, self._cache)
    self._model.choose(logits, self._tokens[: len(logits)])
    return logits


@mock.patch.object(GraphedPrompts, "_launch", _without_graph)
def main() -> None:
    """Raises if a request brings no tokens; memory errors are the sanitizer's to find."""
    for name in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"):
        with without_graphs(), make(name) as llm:
            for rows in BATCHES:
                for params in (GREEDY, DRAWN):
                    answers = llm.generate(PROMPTS[:rows], dataclasses.replace(params, max_tokens=3))
                    assert all(len(answer.token_ids) == 3 for answer in answers)
    if torch.cuda.get_device_capability() == (9, 0):
        assert Steps.of((300, 1)).logits([(130, 0), (300, 1)], None).isfinite().all()


if __name__ == "__main__":
    main()
