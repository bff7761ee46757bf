"""`init`: what FlexFlow's runtime is told for a whole process. Enters: a dict or keywords. Leaves: checked Settings.

FlexFlow's runtime is one a process, so is what `init` keeps here. It holds names and numbers only: every LLM that is
compiled reads them once, and models live side by side.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from flexmoe.errors import ConfigError
from flexmoe.serve.errors import NotServedError, UnknownArgumentError, WrongTypeError
from flexmoe.serve.requests import NO_ADAPTERS
from flexmoe.serve.types import PeftSupportMode

REQUIRED = ("num_gpus", "memory_per_gpu", "zero_copy_memory_per_node")
DEGREES = (
    "data_parallelism_degree",
    "tensor_parallelism_degree",
    "pipeline_parallelism_degree",
    "expert_parallelism_degree",
)
STRATEGIES = ("auto", "tensor", "expert", "hybrid")

# Filled into the caller's dict, as FlexFlow does. Sizes in MB: FlexFlow's own two reserve sizes default to a number of
# bytes where its documentation promises MB.
DEFAULTS: Mapping[str, Any] = {
    "num_cpus": 4,
    "cpu_memory_per_node": 1024,
    "legion_utility_processors": 8,
    **dict.fromkeys(DEGREES, 1),
    "moe_strategy": "auto",
    "offload": False,
    "offload_reserve_space_size": 8 * 1024,
    "use_4bit_quantization": False,
    "use_8bit_quantization": False,
    "enable_peft": False,
    "peft_activation_reserve_space_size": 1024,
    "peft_support_mode": PeftSupportMode.PEFT_DISABLED,
    "profiling": False,
    "benchmarking": False,
    "inference_debugging": False,
    "fusion": True,
    "log_instance_cration": False,
}
_POSITIVE = (
    *REQUIRED,
    "num_cpus",
    "cpu_memory_per_node",
    "legion_utility_processors",
    *DEGREES,
    "offload_reserve_space_size",
    "peft_activation_reserve_space_size",
)
# Known, and without a meaning here: there is no Legion runtime and no operator graph to fuse.
# zero_copy_memory_per_node has none either, but it is required: naming it each time would be noise.
_NO_EFFECT = (
    "num_cpus",
    "cpu_memory_per_node",
    "legion_utility_processors",
    "offload",
    "offload_reserve_space_size",
    "peft_activation_reserve_space_size",
    "profiling",
    "inference_debugging",
    "fusion",
    "log_instance_cration",
    "log_instance_creation",
)
# What serve/strategy.py acts on; the others steer a search of another kind than ours.
STRATEGY = ("search_budget", "import_strategy", "export_strategy", "machine_model_file", "only_data_parallel")
SEARCH = (
    "search_alpha",
    "machine_model_version",
    "simulator_workspace_size",
    "substitution_json_path",
    "perform_memory_search",
    "enable_parameter_parallel",
    "enable_attribute_parallel",
    "base_optimize_threshold",
)
KNOWN = (*REQUIRED, *DEFAULTS, "log_instance_creation", *STRATEGY, *SEARCH)

_log = logging.getLogger("flexmoe.serve")


class Process:
    """What `init` was told, and which names were already talked about."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self._said: set[str] = set()

    @property
    def initialized(self) -> bool:
        return bool(self.settings)

    def get(self, name: str) -> Any:
        """A setting, its default before `init`."""
        return self.settings.get(name, DEFAULTS.get(name))

    def unsaid(self, names: Iterable[str]) -> list[str]:
        """Those of the names that nothing was said about yet; they count as told from now on."""
        new = [name for name in names if name not in self._said]
        self._said.update(new)
        return new


process = Process()


def init(configs_dict: dict[str, Any] | None = None, **options: Any) -> None:
    """Say what FlexFlow's runtime should know: one dict, or keywords, not both.

    num_gpus, memory_per_gpu and zero_copy_memory_per_node (both in MB) are required. A dict is filled with the
    defaults of the keys it lacks, and keys that are not ours (`llm_model`, `prompt` ...) are left alone and logged
    once. Raises ValueError and TypeError where FlexFlow does, NotServedError for adapters.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in KNOWN:
            raise UnknownArgumentError(name, KNOWN, "flexmoe.serve.init")
    if configs_dict is not None and given:
        raise ConfigError(
            f"init got both a dict and the keywords {', '.join(given)}; put them into the dict, or give keywords only."
        )
    if configs_dict is None:
        configs_dict = given
    elif type(configs_dict) is not dict:
        kind = type(configs_dict).__name__
        raise WrongTypeError(f"configs_dict is a {kind}, not a dict; read a JSON file with json.load first.")
    _check(configs_dict)
    _speak(configs_dict)
    for name, default in DEFAULTS.items():
        if configs_dict.get(name) is None:
            configs_dict[name] = default
    if process.initialized:
        _log.warning("init was called again: what it says now holds for models that are compiled from here on.")
    process.settings = dict(configs_dict)


def _check(config: Mapping[str, Any]) -> None:
    missing = [name for name in REQUIRED if config.get(name) is None]
    if missing:
        raise ConfigError(f"init lacks {', '.join(missing)}; required are {', '.join(REQUIRED)} (sizes in MB).")
    for name in _POSITIVE:
        value = config.get(name)
        if value is None:
            continue
        if type(value) is not int:
            raise WrongTypeError(f"{name}={value!r} is a {type(value).__name__}, not an int.")
        if value <= 0:
            raise ConfigError(f"{name}={value} is not positive; use at least 1.")
    strategy = config.get("moe_strategy")
    if strategy is not None and strategy not in STRATEGIES:
        raise ConfigError(f"moe_strategy={strategy!r} is not one of {', '.join(STRATEGIES)}.")
    _check_served(config)
    check_strategy(config)


def _check_served(config: Mapping[str, Any]) -> None:
    if config.get("use_4bit_quantization") and config.get("use_8bit_quantization"):
        raise ConfigError("use_4bit_quantization and use_8bit_quantization are both True; set one of them.")
    mode = config.get("peft_support_mode")
    mode_name = mode.name if isinstance(mode, PeftSupportMode) else mode
    if config.get("enable_peft"):
        raise NotServedError(f"enable_peft=True: {NO_ADAPTERS} Set enable_peft to False to serve the model alone.")
    if mode_name not in (None, PeftSupportMode.PEFT_DISABLED.name):
        raise NotServedError(f"peft_support_mode={mode_name}: {NO_ADAPTERS} PEFT_DISABLED serves the model alone.")


def check_strategy(config: Mapping[str, Any]) -> None:
    """Raise WrongTypeError or ConfigError for values that are no strategy."""
    for name in ("import_strategy", "export_strategy", "machine_model_file"):
        value = config.get(name)
        if value is not None and not isinstance(value, str | PathLike):
            raise WrongTypeError(f"{name}={value!r} is a {type(value).__name__}; give the name of a file.")
    budget, only_data = config.get("search_budget"), config.get("only_data_parallel")
    if budget is not None and type(budget) is not int:
        raise WrongTypeError(f"search_budget={budget!r} is a {type(budget).__name__}, not an int.")
    if budget is not None and budget < -1:
        raise ConfigError(f"search_budget={budget} is below -1; use a number of plans, or -1 for all.")
    if only_data is not None and type(only_data) is not bool:
        raise WrongTypeError(f"only_data_parallel={only_data!r} is neither True nor False.")
    if wants_search(config) and config.get("import_strategy"):
        raise ConfigError("import_strategy names a plan, so nothing is searched; leave it or search_budget out.")
    given = [name for name in DEGREES if (config.get(name) or 1) > 1]
    if given and (wants_search(config) or config.get("import_strategy")):
        raise ConfigError(f"{given[0]}={config[given[0]]} is what a strategy says; leave it or the strategy out.")


def wants_search(settings: Mapping[str, Any]) -> bool:
    """Whether a strategy is to be searched. FlexFlow's budget of 0 is none."""
    return bool(settings.get("search_budget") or settings.get("only_data_parallel"))


def _speak(config: Mapping[str, Any]) -> None:
    """Name once what has no effect (a warning) and what is not ours (a note in the log)."""
    set_ = {name for name, value in config.items() if value is not None and value is not False}
    idle = process.unsaid(name for name in _NO_EFFECT if name in set_)
    if idle:
        _log.warning("no effect in FlexMoE: %s.", ", ".join(idle))
    search = process.unsaid(name for name in SEARCH if name in set_)
    if search:
        _log.warning("no effect, for the search costs every plan within its budget: %s.", ", ".join(search))
    foreign = process.unsaid(str(name) for name in config if name not in KNOWN)
    if foreign:
        _log.info("keys that init leaves alone: %s.", ", ".join(foreign))
