"""FlexFlow's program `incr_decoding`. Enters: its flags or its JSON configuration. Leaves: results, in a file too.

Flags are told by their name alone: FlexFlow writes some with one dash and some with two, and scripts do as they like.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexmoe.errors import ConfigError
from flexmoe.serve import files
from flexmoe.serve.errors import UnknownArgumentError, WrongTypeError
from flexmoe.serve.llm import LLM
from flexmoe.serve.requests import GenerationConfig, GenerationResult, Request
from flexmoe.serve.settings import KNOWN, SEARCH, STRATEGY, init
from flexmoe.serve.types import DataType

# Keys of a configuration that are not for `init`, with what FlexFlow's program takes for them.
DEFAULTS: Mapping[str, Any] = {
    "llm_model": "",
    "cache_path": "",
    "refresh_cache": False,
    "full_precision": False,
    "bfloat16": False,
    "prompt": "",
    "output_file": "",
    "max_requests_per_batch": 8,
    "max_tokens_per_batch": 128,
    "max_seq_length": 256,
    "num_kv_cache_slots": -1,
    "max_length": 128,
    "do_sample": False,
    "temperature": 0.9,
    "topp": 0.8,
    "topk": 1,
    "verbose": False,
}
PROMPT = "Three tips for staying healthy are: "  # FlexFlow's, where no prompt is given

_RENAMED = {
    "cache-folder": "cache_path",
    "use-full-precision": "full_precision",
    "use-bf16": "bfloat16",
    "max-sequence-length": "max_seq_length",
    "4bit-quantization": "use_4bit_quantization",
    "8bit-quantization": "use_8bit_quantization",
    "ll:gpu": "num_gpus",
    "ll:fsize": "memory_per_gpu",
    "ll:zsize": "zero_copy_memory_per_node",
    "ll:cpu": "num_cpus",
    "ll:util": "legion_utility_processors",
    "ll:csize": "cpu_memory_per_node",
}
_KEYS = {**{key.replace("_", "-"): key for key in (*DEFAULTS, *KNOWN, "config_file")}, **_RENAMED}
_SWITCHES = frozenset(
    "refresh-cache full-precision use-full-precision bfloat16 use-bf16 do-sample verbose offload 4bit-quantization "
    "8bit-quantization use-4bit-quantization use-8bit-quantization enable-peft profiling benchmarking "
    "inference-debugging fusion log-instance-creation log-instance-cration only-data-parallel warmup".split()
)
# Read over, with their values: of Legion, Realm and GASNet, and of FlexFlow's own load test.
_IGNORED = ("ll:", "lg:", "gex:", "cuda:", "level", "logfile", "qps", "profiling-folder", "warmup", "nodes")
_NUMBERS: Mapping[str, Callable[[str], Any]] = {"temperature": float, "topp": float}
_TEXTS = frozenset(
    (*SEARCH, *STRATEGY[1:], *(key for key, value in DEFAULTS.items() if value == ""), "config_file", "moe_strategy")
)


def parse(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Flags as keys of a configuration, and the flags that were read over.

    Raises UnknownArgumentError with the nearest flag, ConfigError for a value that is missing or no number.
    """
    config: dict[str, Any] = {}
    ignored: list[str] = []
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        name = flag.lstrip("-").lower().replace("_", "-")
        if flag == name or not name:
            raise ConfigError(f"{flag!r} is no flag; FlexFlow's begin with a dash, e.g. -llm-model.")
        key = _KEYS.get(name)
        if key is None and not name.startswith(_IGNORED):
            raise UnknownArgumentError(flag, [f"-{known}" for known in _KEYS], "incr_decoding")
        if key is None:
            ignored.append(flag)
            if rest and not rest[0].startswith("-"):
                rest.pop(0)  # its value
        else:
            config[key] = _typed(flag, key, True if name in _SWITCHES else _value(flag, rest))
    return config, ignored


def _value(flag: str, rest: list[str]) -> str:
    if not rest:
        raise ConfigError(f"{flag} needs a value behind it.")
    return rest.pop(0)


def _typed(flag: str, key: str, value: Any) -> Any:
    if value is True or key in _TEXTS:
        return value
    try:
        return _NUMBERS.get(key, int)(value)
    except ValueError as error:
        raise ConfigError(f"{flag} {value}: that is not a number.") from error


def complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration: that of a `config_file`, over it what is given beside it, below both the defaults.

    Raises WrongTypeError for a value of another type than its default.
    """
    path = given.get("config_file")
    config = {**(files.read_config(path) if path else {}), **{k: v for k, v in given.items() if k != "config_file"}}
    config = {key: value for key, value in config.items() if value is not None}
    for key, default in DEFAULTS.items():
        wanted = (int, float) if isinstance(default, float) else type(default)
        value = config.get(key, default)
        if not isinstance(value, wanted) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise WrongTypeError(f"{key}={value!r} is a {type(value).__name__}; use a {type(default).__name__}.")
    return {**DEFAULTS, **config}


def run(given: Mapping[str, Any]) -> list[GenerationResult]:
    """Serve the prompts of a configuration, see `complete`. output_file gets a record of each request."""
    c = complete(given)
    if not c["llm_model"]:
        raise ConfigError("no model is named; give -llm-model (a folder, a hub id, or builtin).")
    # FlexFlow's runtime needs these three; a model here runs without any of them.
    needed = {"num_gpus": 1, "zero_copy_memory_per_node": 1, "memory_per_gpu": 2**24}
    init(needed | {key: value for key, value in c.items() if key not in DEFAULTS})
    if c["prompt"]:
        files.read_prompts(c["prompt"])  # a bad file is refused before the model is loaded
    llm = LLM(c["llm_model"], _data_type(c), c["cache_path"], c["refresh_cache"], c["output_file"])
    sampling = GenerationConfig(c["do_sample"], c["temperature"], c["topp"], c["topk"])
    llm.compile(
        sampling,
        c["max_requests_per_batch"],
        c["max_seq_length"],
        c["max_tokens_per_batch"],
        num_kv_cache_slots=c["num_kv_cache_slots"],
    )
    try:
        longest = min(c["max_length"], llm.max_seq_length - 1)  # compile may have cut it to the model's context
        default = [Request(prompt=PROMPT, max_length=longest)]
        return llm.generate(files.read_prompts(c["prompt"], longest) if c["prompt"] else default)
    finally:
        llm.close()


def _data_type(config: Mapping[str, Any]) -> DataType:
    if config["full_precision"]:
        return DataType.DT_FLOAT
    return DataType.DT_BFLOAT16 if config["bfloat16"] else DataType.DT_HALF
