"""FlexFlow's enumerations, with its names and numbers: scripts compare them, print them and read them from JSON."""

from __future__ import annotations

from enum import Enum


class DataType(Enum):
    """Number formats. A model computes in DT_HALF, DT_FLOAT or DT_BFLOAT16; the others are there by name only."""

    DT_BOOLEAN = 40
    DT_INT32 = 41
    DT_INT64 = 42
    DT_HALF = 43
    DT_FLOAT = 44
    DT_DOUBLE = 45
    DT_INT4 = 46
    DT_INT8 = 47
    DT_NONE = 49
    DT_BFLOAT16 = 50


class ModelType(Enum):
    """FlexFlow's model families, and MOE for those it lacks."""

    UNKNOWN = 3001
    LLAMA = 3002
    OPT = 3003
    FALCON = 3004
    STARCODER = 3005
    MPT = 3006
    MOE = 3100


class InferenceMode(Enum):
    """Only INC_DECODING_MODE is served."""

    INC_DECODING_MODE = 2001
    BEAM_SEARCH_MODE = 2002
    TREE_VERIFY_MODE = 2003


class RequestType(Enum):
    """Only REQ_INFERENCE is served."""

    REQ_INFERENCE = 4001
    REQ_FINETUNING = 4002


class OptimizerType(Enum):
    """Optimizers of finetuning, which is not served."""

    OPTIMIZER_TYPE_NONE = 60
    OPTIMIZER_TYPE_SGD = 61
    OPTIMIZER_TYPE_ADAM = 62


class PeftSupportMode(Enum):
    """Only PEFT_DISABLED is served."""

    PEFT_DISABLED = 5001
    PEFT_ENABLED_INFERENCE_ONLY = 5002
    PEFT_ENABLED_INFERENCE_FINETUNING = 5003


class ActiMode(Enum):
    """Activations of FlexFlow's layers; here by name only."""

    AC_MODE_NONE = 10
    AC_MODE_RELU = 11
    AC_MODE_SIGMOID = 12
    AC_MODE_TANH = 13
    AC_MODE_GELU = 14


class AggrMode(Enum):
    """How FlexFlow's embeddings aggregate; here by name only."""

    AGGR_MODE_NONE = 20
    AGGR_MODE_SUM = 21
    AGGR_MODE_AVG = 22


class PoolType(Enum):
    """Pooling of FlexFlow's layers; here by name only."""

    POOL_MAX = 30
    POOL_AVG = 31


class CompMode(Enum):
    """Only INFERENCE is served."""

    TRAINING = 70
    INFERENCE = 71


class ParameterSyncType(Enum):
    """How FlexFlow's training synchronises; here by name only."""

    NONE = 80
    PS = 81
    NCCL = 82
