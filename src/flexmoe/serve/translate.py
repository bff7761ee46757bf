"""From FlexFlow's words to those of `flexmoe.LLM`. Enters: compile arguments and settings. Leaves: options by name."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flexmoe.config.engine import SchedulerConfig
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.shard import Shard, check
from flexmoe.errors import ConfigError, RequestError
from flexmoe.models.slices import num_parameters
from flexmoe.serve.errors import NotServedError, WrongTypeError
from flexmoe.serve.settings import DEGREES
from flexmoe.serve.strategy import plan_in_force
from flexmoe.serve.types import DataType

_log = logging.getLogger("flexmoe.serve")

_MB = 2**20
_BLOCK = 16  # tokens; flexmoe.LLM's block_size, spelt out because slots are counted in it
_DTYPES = {
    DataType.DT_HALF: "float16",
    DataType.DT_FLOAT: "float32",
    DataType.DT_BFLOAT16: "bfloat16",
}
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_SIZES = {degree: degree.replace("parallelism_degree", "parallel_size") for degree in DEGREES}
# Our words in messages, and what a FlexFlow user calls them.
_WORDS = {
    **{size: degree for degree, size in _SIZES.items()},
    "max_num_seqs": "max_requests_per_batch",
    "max_num_batched_tokens": "max_tokens_per_batch",
    "max_model_len": "max_seq_length",
    "num_blocks": "num_kv_cache_slots",
    "kv_cache_memory": "memory_per_gpu",
    "top_p": "topp",
    "top_k": "topk",
    "dtype": "data_type",
}
_WORD = re.compile(rf"\b({'|'.join(_WORDS)})\b")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The numbers of `compile`. num_kv_cache_slots: tokens in the KV cache, -1 for what full batches need."""

    max_requests_per_batch: int = 1
    max_seq_length: int = 256
    max_tokens_per_batch: int = 64
    num_kv_cache_slots: int = -1

    def __post_init__(self) -> None:
        for name in ("max_requests_per_batch", "max_seq_length", "max_tokens_per_batch", "num_kv_cache_slots"):
            value = getattr(self, name)
            if type(value) is not int:
                raise WrongTypeError(f"{name}={value!r} is a {type(value).__name__}, not an int.")
            if value < 1 and not (name == "num_kv_cache_slots" and value == -1):
                raise ConfigError(f"{name}={value} is not positive; use at least 1.")
        if self.max_seq_length < 2:
            raise ConfigError("max_seq_length=1 leaves no room for a prompt and a token; use at least 2.")


def data_type_name(data_type: object) -> DataType:
    """The data type, checked. Raises WrongTypeError or ConfigError; FlexFlow asserts."""
    if not isinstance(data_type, DataType):
        raise WrongTypeError(f"data_type={data_type!r} is not a DataType; use DataType.DT_HALF or DT_FLOAT.")
    if data_type not in _DTYPES:
        raise ConfigError(f"data_type={data_type.name} is no format to compute in; use DT_HALF, DT_BFLOAT16, DT_FLOAT.")
    return data_type


def dtype(data_type: DataType, cuda: bool) -> str:
    """flexmoe.LLM's dtype. DT_HALF is fp16 on a GPU.

    On a CPU it is "auto": fp16 arithmetic is many times slower there, and the checkpoint's own format (or fp32, where
    that is quicker) keeps every weight exact.
    """
    return "auto" if data_type is DataType.DT_HALF and not cuda else _DTYPES[data_type]


def within_context(limits: Limits, config: ModelConfig) -> int:
    """max_seq_length, or the model's own context if that is shorter: FlexFlow would read positions never trained."""
    if limits.max_seq_length <= config.max_position:
        return limits.max_seq_length
    _log.warning(
        "max_seq_length=%d is above this model's context of %d tokens, which is used instead.",
        limits.max_seq_length,
        config.max_position,
    )
    return config.max_position


def engine_options(
    limits: Limits, config: ModelConfig, settings: Mapping[str, Any], *, dtype: str, cuda: bool
) -> dict[str, Any]:
    """Options of `flexmoe.LLM`. settings: of `init`, with the degrees in force for this model.

    Raises ConfigError if memory_per_gpu cannot hold the model, or for strategies and degrees that do not go together.
    """
    length = within_context(limits, config)
    sizes = parallel_sizes(settings)
    scheduler = SchedulerConfig(
        max_num_seqs=limits.max_requests_per_batch,
        max_num_batched_tokens=limits.max_tokens_per_batch,
        max_model_len=length,
    )
    plan = plan_in_force(settings, ParallelPlan.from_json(sizes), config, scheduler, dtype, cuda=cuda)
    options: dict[str, Any] = {
        "dtype": dtype,
        "max_num_seqs": limits.max_requests_per_batch,
        "max_model_len": length,
        "max_num_batched_tokens": limits.max_tokens_per_batch,
        "block_size": _BLOCK,
        **(sizes if plan == ParallelPlan.from_json(sizes) else {"plan": plan}),
    }
    options |= _quantization(settings, cuda=cuda)
    if settings.get("benchmarking"):
        options["load_format"] = "dummy"
    if limits.num_kv_cache_slots != -1:
        options["num_blocks"] = -(-limits.num_kv_cache_slots // _BLOCK)
    if cuda and settings.get("memory_per_gpu"):
        options |= _within_memory(limits, length, config, plan, settings["memory_per_gpu"], _BYTES[dtype])
    return options


def _quantization(settings: Mapping[str, Any], *, cuda: bool) -> dict[str, str]:
    """Weights in few bits, where the engine has them. Raises NotServedError on a GPU."""
    for name, bits in (("use_4bit_quantization", "int4"), ("use_8bit_quantization", "int8")):
        if settings.get(name):
            if cuda:
                raise NotServedError(f"{name}=True: weights are quantized on a CPU only; leave it out and use DT_HALF.")
            return {"quantization": bits}
    return {}


def parallel_sizes(settings: Mapping[str, Any]) -> dict[str, int]:
    """Degrees by flexmoe.LLM's names. moe_strategy says how the experts share the ranks of tensor x data."""
    sizes = {size: settings.get(degree) or 1 for degree, size in _SIZES.items()}
    shared = sizes["tensor_parallel_size"] * sizes["data_parallel_size"]
    experts, strategy = sizes["expert_parallel_size"], settings.get("moe_strategy") or "auto"
    if shared == 1:
        return sizes
    if strategy == "expert" and experts == 1:
        experts = shared
    fits = {"auto": True, "tensor": experts == 1, "expert": experts == shared, "hybrid": 1 < experts < shared}[strategy]
    if not fits:
        want = {"tensor": "1", "expert": str(shared), "hybrid": f"a divisor of {shared} between 1 and {shared}"}
        raise ConfigError(
            f"moe_strategy={strategy!r} with expert_parallelism_degree={experts} and {shared} ranks (tensor x data) do "
            f"not go together; use expert_parallelism_degree={want[strategy]}, or moe_strategy='auto'."
        )
    return {**sizes, "expert_parallel_size": experts}


def _within_memory(
    limits: Limits, length: int, config: ModelConfig, plan: ParallelPlan, memory_mb: int, element: int
) -> dict[str, int]:
    """The KV cache that weights leave of memory_per_gpu on the fullest GPU, if it must be smaller than asked for."""
    check(plan, config)
    context = -(-length // _BLOCK)
    asked = limits.max_requests_per_batch * context
    if limits.num_kv_cache_slots != -1:
        asked = -(-limits.num_kv_cache_slots // _BLOCK)
    room, weights, block = min(
        _room(Shard(plan, config, rank), memory_mb * _MB, element) for rank in range(plan.num_ranks)
    )
    if room < min(asked, context):
        need = -(-(weights + context * block) // _MB)
        raise ConfigError(
            f"memory_per_gpu={memory_mb} MB cannot hold {weights // _MB} MB of weights and the KV cache of one request "
            f"of max_seq_length={length}; raise it to {need}, or use a smaller model or max_seq_length."
        )
    return {"num_blocks": min(asked, room)}


def _room(shard: Shard, memory: int, element: int) -> tuple[int, int, int]:
    """Of one GPU: blocks of KV cache beside the weights, then the bytes of these weights and of a block."""
    local = shard.local
    block = 2 * local.num_layers * local.attention.num_kv_heads * local.attention.head_dim * element * _BLOCK
    weights = num_parameters(shard) * element
    return (memory - weights) // block, weights, block


def in_their_words(message: str) -> str:
    """A message of FlexMoE with FlexFlow's names of the options."""
    return _WORD.sub(lambda match: _WORDS[match[1]], message)


@contextlib.contextmanager
def speaking_flexflow() -> Iterator[None]:
    """Errors of options and requests leave with FlexFlow's names in them."""
    try:
        yield
    except (ConfigError, RequestError) as error:
        message = in_their_words(str(error))
        if message == str(error):
            raise
        raise (ConfigError if isinstance(error, ConfigError) else RequestError)(message) from error
