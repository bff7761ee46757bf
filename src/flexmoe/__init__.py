"""FlexMoE serves Mixture-of-Experts language models. The plain face: LLM, SamplingParams, RequestOutput, the errors.

    from flexmoe import LLM, SamplingParams
    with LLM() as llm:                       # the built-in model; or a folder, or a hub id
        print(llm.generate("Once upon a time", SamplingParams(max_tokens=64))[0].text)

Names are imported when they are first asked for, so that `import flexmoe` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flexmoe.config.sampling import SamplingParams
from flexmoe.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    EngineError,
    FlexMoEError,
    MissingDependencyError,
    MissingTensorError,
    RankError,
    RequestError,
    RequestFailedError,
    TensorShapeError,
    UnknownOptionError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from flexmoe.engine.outputs import CompletionOutput, RequestOutput
    from flexmoe.llm import LLM

__version__ = "0.1.0"

_LAZY = {
    "LLM": "flexmoe.llm",
    "RequestOutput": "flexmoe.engine.outputs",
    "CompletionOutput": "flexmoe.engine.outputs",
}

__all__ = [
    "LLM",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "EngineDeadError",
    "EngineError",
    "FlexMoEError",
    "MissingDependencyError",
    "MissingTensorError",
    "RankError",
    "RequestError",
    "RequestFailedError",
    "RequestOutput",
    "SamplingParams",
    "TensorShapeError",
    "UnknownOptionError",
    "UnsupportedModelError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'flexmoe' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
