"""One step of an engine as a timeline of its stages. Enters: an engine. Leaves: Mark after Mark, each with its seconds.

A mark ends what began at the mark before it, so that the seconds of all marks add up to the step's.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexmoe.engine import model_runner
from flexmoe.engine.engine import Engine
from flexmoe.moe.block import MoEBlock

# What the model's probe and the engine's functions are called, where the stage is called otherwise.
_STAGE_OF = {
    "build_batch": "batch",
    "build_paged_rows": "batch",
    "topk_ids": "router",
    "moe": "combine",
    "layer": "add",
    "run": "sampler",
}


@dataclass(frozen=True, slots=True)
class Mark:
    """A stage, of a layer or (layer -1) outside of them; shape: of what it made, if that is a tensor."""

    stage: str
    layer: int
    seconds: float
    shape: tuple[int, ...] | None


@dataclass
class Timeline:
    """Collects marks; it is the engine's probe while attached. topk: experts and weights of each MoE layer, [T, K]."""

    cuda: bool
    marks: list[Mark] = field(default_factory=list)
    topk: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _since: float = 0.0
    _ids: Tensor | None = None

    def start(self) -> None:
        """Time runs from here."""
        self._since = self._now()

    def mark(self, stage: str, layer: int = -1, tensor: object = None) -> None:
        """The stage has ended."""
        seconds = self._now() - self._since
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else None
        self.marks.append(Mark(_STAGE_OF.get(stage, stage), layer, seconds, shape))
        self._since = self._now()  # what the mark itself takes is nobody's

    def record(self, stage: str, layer: int, tensor: Tensor) -> None:
        """Called by the model with each tensor it makes."""
        if stage == "topk_weights":
            assert self._ids is not None, "the experts come before their weights"
            self.topk[layer] = (self._ids.cpu(), tensor.float().cpu())
            return
        self.mark(stage, layer, tensor)
        if stage == "topk_ids":
            self._ids = tensor

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def trace_step(engine: Engine) -> Timeline:
    """Compute the engine's next step and note its stages. The engine must have a request waiting or running."""
    timeline = Timeline(cuda=engine.runner.device.type == "cuda")
    with _attached(engine, timeline):
        timeline.start()
        engine.step()
        timeline.mark("detokenizer")
    return timeline


@contextlib.contextmanager
def _attached(engine: Engine, timeline: Timeline) -> Iterator[None]:
    """Within, the engine's stages leave marks. The model is asked by its probe, the rest by hooks and wrappers."""
    runner = engine.local_runner
    with contextlib.ExitStack() as stack:
        stack.enter_context(_marked(engine.scheduler, "schedule", timeline))
        stack.enter_context(_marked(engine.scheduler, "update", timeline))
        stack.enter_context(_marked(runner, "run", timeline))
        for name in ("build_batch", "build_paged_rows"):
            stack.enter_context(_marked(model_runner, name, timeline))
        hooks = [runner.model.register_forward_hook(lambda _, __, out: timeline.mark("norm", -1, out))]
        for module in runner.model.modules():
            if isinstance(module, MoEBlock):
                hooks += _expert_hooks(module, timeline)
        for hook in hooks:
            stack.callback(hook.remove)
        runner.probe = timeline
        stack.callback(setattr, runner, "probe", None)
        yield


def _expert_hooks(block: MoEBlock, timeline: Timeline) -> list[Any]:
    def before(_: object, arguments: tuple[object, ...]) -> None:
        timeline.mark("dispatch", block.layer, arguments[0])

    def after(_: object, __: object, out: object) -> None:
        timeline.mark("experts", block.layer, out)

    return [block.experts.register_forward_pre_hook(before), block.experts.register_forward_hook(after)]


@contextlib.contextmanager
def _marked(owner: object, name: str, timeline: Timeline) -> Iterator[None]:
    """Within, `owner.name`, a method or a module's function, leaves a mark when it returns."""
    function: Callable[..., Any] = getattr(owner, name)
    own = name in vars(owner)  # a method is its class's: then the wrapper is removed, not replaced

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        timeline.mark(name)
        return result

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, function)
        else:
            delattr(owner, name)
