"""`flexflow.core` as far as serving scripts touch it: the clock, the settings, and classes that say why they lack."""

from __future__ import annotations

import time
from typing import Any

from flexmoe.serve.errors import NotServedError
from flexmoe.serve.settings import process


class FFConfig:
    """The settings of `init` as attributes, and the clock that scripts measure with."""

    def __init__(self) -> None:
        for name in ("data", "tensor", "pipeline", "expert"):
            setattr(self, f"{name}_parallelism_degree", process.get(f"{name}_parallelism_degree"))
        self.workers_per_node = process.get("num_gpus") or 1
        self.num_nodes = 1
        self.cpu_offload = bool(process.get("offload"))
        self.enable_peft = False
        self.enable_peft_finetuning = False

    def get_current_time(self) -> float:
        """Microseconds of a clock that only goes forward."""
        return time.perf_counter() * 1e6


class _Absent:
    """A class of FlexFlow that builds or trains graphs. It can be imported; making one says why it is not there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotServedError(
            f"{type(self).__name__} builds FlexFlow's graphs layer by layer; FlexMoE serves whole models. "
            "Use LLM(model_name), compile and generate."
        )


def _absent(name: str) -> type[_Absent]:
    return type(name, (_Absent,), {"__module__": __name__})


AdamOptimizer = _absent("AdamOptimizer")
FFModel = _absent("FFModel")
FileDataLoader = _absent("FileDataLoader")
InferenceManager = _absent("InferenceManager")
Initializer = _absent("Initializer")
Layer = _absent("Layer")
Op = _absent("Op")
Parameter = _absent("Parameter")
RequestManager = _absent("RequestManager")
RotaryEmbeddingMeta = _absent("RotaryEmbeddingMeta")
SGDOptimizer = _absent("SGDOptimizer")
SingleDataLoader = _absent("SingleDataLoader")
Tensor = _absent("Tensor")
