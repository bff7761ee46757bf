"""Captures: an engine that has just started. Enters: its step times, and steps in their order. Leaves: seconds.

On GPUs steps of short prompts are CUDA graphs, one for each form (`scheduling/prompt_forms.py`). The first step of a
form is launched kernel by kernel, the second captured, and only from then on the host has nothing to do with it.
"""

from __future__ import annotations

from collections import Counter

from flexmoe.planner.steps import Steps
from flexmoe.scheduling.prompt_forms import graph_form, graphed_by
from flexmoe.scheduling.step import Step


class Captures:
    """Step times of one engine that remembers which forms it had."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        cost = steps.cost
        self._most = graphed_by(cost.plan) if cost.machine.device.kind == "cuda" else 0
        self._launching = cost.model.num_layers * cost.machine.device.prompt_layer_s
        self._seen: Counter[tuple[int, int]] = Counter()

    def seconds(self, step: Step) -> float:
        """Of the next step."""
        seconds, prompts = self._steps.seconds(step), step.chunks[step.num_decodes :]
        if not prompts:
            return seconds
        form = graph_form(sum(chunk.num_tokens for chunk in prompts), len(prompts), self._most)
        if form is None:
            return seconds
        self._seen[form] += 1
        if self._seen[form] == 1:
            return max(seconds, self._launching)
        return seconds + self._launching if self._seen[form] == 2 else seconds
