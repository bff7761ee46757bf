"""FlexFlow Serve's Python API over FlexMoE: `import flexmoe.serve as ff`, and the script runs.

    import flexmoe.serve as ff
    ff.init(num_gpus=1, memory_per_gpu=14000, zero_copy_memory_per_node=30000)
    llm = ff.LLM("builtin")
    llm.compile(ff.GenerationConfig(do_sample=False), max_requests_per_batch=4, max_seq_length=256)
    print(llm.generate("Once upon a time", max_new_tokens=32)[0].output_text)

Or leave the script as it is: `flexmoe run SCRIPT.py`. docs/flexflow.md tells every name and what it does here.
"""

from __future__ import annotations

from flexmoe.serve.core import (
    AdamOptimizer,
    FFConfig,
    FFModel,
    FileDataLoader,
    InferenceManager,
    Initializer,
    Layer,
    Op,
    Parameter,
    RequestManager,
    RotaryEmbeddingMeta,
    SGDOptimizer,
    SingleDataLoader,
    Tensor,
)
from flexmoe.serve.errors import (
    MissingModelError,
    NotCompiledError,
    NotServedError,
    UnknownArgumentError,
    WrongPromptError,
    WrongTypeError,
)
from flexmoe.serve.llm import LLM, SSM
from flexmoe.serve.requests import GenerationConfig, GenerationResult, LoraLinearConfig, PEFTModelID, Request
from flexmoe.serve.settings import init
from flexmoe.serve.text import OutputText
from flexmoe.serve.types import (
    ActiMode,
    AggrMode,
    CompMode,
    DataType,
    InferenceMode,
    ModelType,
    OptimizerType,
    ParameterSyncType,
    PeftSupportMode,
    PoolType,
    RequestType,
)

__all__ = [
    "LLM",
    "SSM",
    "ActiMode",
    "AdamOptimizer",
    "AggrMode",
    "CompMode",
    "DataType",
    "FFConfig",
    "FFModel",
    "FileDataLoader",
    "GenerationConfig",
    "GenerationResult",
    "InferenceManager",
    "InferenceMode",
    "Initializer",
    "Layer",
    "LoraLinearConfig",
    "MissingModelError",
    "ModelType",
    "NotCompiledError",
    "NotServedError",
    "Op",
    "OptimizerType",
    "OutputText",
    "PEFTModelID",
    "Parameter",
    "ParameterSyncType",
    "PeftSupportMode",
    "PoolType",
    "Request",
    "RequestManager",
    "RequestType",
    "RotaryEmbeddingMeta",
    "SGDOptimizer",
    "SingleDataLoader",
    "Tensor",
    "UnknownArgumentError",
    "WrongPromptError",
    "WrongTypeError",
    "init",
]
