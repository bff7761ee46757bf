"""EngineConfig: every option of an engine, in small frozen parts. Enters: user values. Leaves: checked ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

from flexmoe.config.plan import ParallelPlan
from flexmoe.errors import ConfigError, UnknownOptionError

BUILTIN_NAME = "builtin"
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
ISAS = ("auto", "portable", "avx2", "avx512", "avx512_bf16", "neon")
QUANTIZATIONS = ("int8", "int4")
EXPERT_BACKENDS = ("auto", "reference", "cpu", "triton")
LAUNCHERS = ("auto", "spawn", "torchrun", "ray")
MAX_ROWS = 512  # decodes that one step on a GPU can have
CPU_SEATS = 64  # decodes of a step on a CPU, unless somebody says


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """KV cache of a rank. block_size in tokens; memory in bytes.

    None: max_num_seqs full contexts, 64 if that is not given, within limits.
    """

    block_size: int = 16
    kv_cache_memory: int | None = None
    num_blocks: int | None = None
    enable_prefix_caching: bool = True


# On a CPU fp32 takes twice the memory of a 16-bit checkpoint, so where the number format is left open it must win by
# more than the noise of a short measurement.
CLEARLY_FASTER = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one step of each data rank: requests that run together, and tokens computed together.

    max_num_seqs: None means what pays on the device, see `on`. max_num_batched_tokens: None means what the roofline of
    model and device says, and on a GPU up to 8,192 where no answer is streamed. max_decode_slowdown: while a streamed
    answer is being decoded, a step that computes prompts beside it takes at most so many times as long as without them,
    but for chunks so short that they would not be cheaper if they were shorter.
    """

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    max_decode_slowdown: float = 2.0

    @property
    def seats(self) -> int:
        """Requests that run together; by default as many as on a CPU."""
        return self.max_num_seqs or CPU_SEATS

    def on(self, kind: str) -> SchedulerConfig:
        """With seats for a kind of device: on a GPU as many as its kernels take rows, which costs no more weights."""
        return self if self.max_num_seqs else replace(self, max_num_seqs=CPU_SEATS if kind == "cpu" else MAX_ROWS)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """Where and in which number format the model computes.

    threads: None means one a physical core. isa: the instruction set of the C kernels on a CPU; "auto" is its best.
    quantization: hold weights in "int8" or "int4"; dtype is then that of all the rest. On a CPU only. None: as the
    checkpoint does. one_pass: compute decodes beside prompts in the prompts' pass, which reads all weights once, not
    twice; then a request's rounding, in bf16 its tokens too, depends on whether others' prompts come meanwhile.
    prompts_ahead: on one GPU, launch steps with prompts, too, before the tokens of the step before are known.
    compile_ahead: on one GPU, compile kernels that later steps may need in processes of their own from the start on,
    and record their graphs while a server has nothing to do.
    """

    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    expert_backend: str = "auto"
    isa: str = "auto"
    quantization: str | None = None
    one_pass: bool = False
    prompts_ahead: bool = True
    compile_ahead: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """Which model, and from where. load_format "dummy" makes seeded random weights from config.json alone.

    model: None for the built-in one, which "builtin" becomes unless a folder of that name is here.
    download_dir: the hub's cache to use instead of HF_HOME's. force_download: fetch again what that cache holds.
    """

    model: str | None = None
    load_format: str = "auto"
    revision: str | None = None
    download_dir: str | None = None
    force_download: bool = False
    progress: bool = False

    def __post_init__(self) -> None:
        model: object = self.model
        if isinstance(model, PathLike):
            object.__setattr__(self, "model", str(model))
        elif model == BUILTIN_NAME and not Path(BUILTIN_NAME).is_dir():
            object.__setattr__(self, "model", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """The processes of a model on several ranks.

    launcher: who starts them. "spawn": this process, on its own machine. "torchrun": they are there already. "ray": a
    Ray cluster, on one machine or many. "auto": torchrun where it started this process, else spawn.
    worker_timeout: seconds without any sign of work from the ranks that owe an answer, after which they count as hung.
    """

    launcher: str = "auto"
    worker_timeout: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All options of one engine."""

    load: LoadConfig = field(default_factory=LoadConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelPlan = field(default_factory=ParallelPlan)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    seed: int = 0

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EngineConfig:
        """Build from flat option names (`max_num_seqs=8`, ...), each checked; unknown names are refused.

        plan: a ParallelPlan, the dictionary that its to_json() gives, or a file that holds it, instead of degrees.
        """
        parts = {"load": LoadConfig, "cache": CacheConfig, "scheduler": SchedulerConfig,
                 "parallel": ParallelPlan, "launch": LaunchConfig, "device": DeviceConfig}  # fmt: skip
        owner = {f.name: part for part, kind in parts.items() for f in fields(kind)}
        values: dict[str, dict[str, Any]] = {part: {} for part in parts}
        whole = {"seed": 0, "plan": None}
        for name, value in options.items():
            if name in whole:
                whole[name] = value
            elif name in owner:
                values[owner[name]][name] = value
            else:
                raise UnknownOptionError(name, [*owner, *whole], "LLM")
        made: dict[str, Any] = {part: kind(**values[part]) for part, kind in parts.items()}
        if whole["plan"] is not None:
            made["parallel"] = _read_plan(whole["plan"], values["parallel"])
        return cls(**made, seed=whole["seed"])  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        _check_choice("dtype", self.device.dtype, DTYPES)
        _check_choice("load_format", self.load.load_format, LOAD_FORMATS)
        _check_choice("expert_backend", self.device.expert_backend, EXPERT_BACKENDS)
        _check_choice("launcher", self.launch.launcher, LAUNCHERS)
        _check_choice("isa", self.device.isa, ISAS)
        if self.device.quantization is not None:
            _check_choice("quantization", self.device.quantization, QUANTIZATIONS)
        self._check_names_and_flags()
        self._check_counts()
        self._check_parallel()

    def _check_names_and_flags(self) -> None:
        load = self.load
        names: dict[str, object] = {"device": self.device.device, "model": load.model, "revision": load.revision}
        names["download_dir"] = load.download_dir
        for name, value in names.items():
            if not isinstance(value, str) and (value is not None or name == "device"):
                raise ConfigError(f"{name}={value!r} is not a string.")
        flags: dict[str, object] = {"progress": load.progress, "force_download": load.force_download}
        flags |= {"enable_prefix_caching": self.cache.enable_prefix_caching, "one_pass": self.device.one_pass}
        flags |= {"prompts_ahead": self.device.prompts_ahead, "compile_ahead": self.device.compile_ahead}
        for name, flag in flags.items():
            if not isinstance(flag, bool):
                raise ConfigError(f"{name}={flag!r} is neither True nor False.")

    def _check_counts(self) -> None:
        counts = {
            "block_size": self.cache.block_size,
        }
        optional = {
            "kv_cache_memory": self.cache.kv_cache_memory,
            "num_blocks": self.cache.num_blocks,
            "max_num_seqs": self.scheduler.max_num_seqs,
            "max_num_batched_tokens": self.scheduler.max_num_batched_tokens,
            "max_model_len": self.scheduler.max_model_len,
            "threads": self.device.threads,
        }
        counts |= {name: value for name, value in optional.items() if value is not None}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} is not a positive integer.")
        slowdown: object = self.scheduler.max_decode_slowdown
        if not isinstance(slowdown, int | float) or isinstance(slowdown, bool) or not slowdown > 1:
            raise ConfigError(f"max_decode_slowdown={slowdown!r} is not a number above 1, which would be no slower.")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"seed={self.seed!r} is not an integer.")

    def _check_parallel(self) -> None:
        if self.launch.launcher in ("torchrun", "ray") and self.parallel.num_ranks == 1:
            raise ConfigError(
                f"launcher={self.launch.launcher!r} starts ranks, but the plan has one, which is this process; raise "
                "tensor_parallel_size or another degree, or leave launcher out."
            )
        timeout: object = self.launch.worker_timeout
        if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not timeout > 0:
            raise ConfigError(f"worker_timeout={timeout!r} is not a positive number of seconds.")


def _read_plan(plan: Any, degrees: Mapping[str, Any]) -> ParallelPlan:
    """The plan given whole. Raises ConfigError if degrees were given beside it that say otherwise."""
    found: ParallelPlan
    if isinstance(plan, ParallelPlan):
        found = plan
    else:
        found = ParallelPlan.read(Path(plan)) if isinstance(plan, str | PathLike) else ParallelPlan.from_json(plan)
    for name, value in degrees.items():
        if value != getattr(found, name):
            raise ConfigError(f"{name}={value!r}, but the plan says {getattr(found, name)!r}; give one of them.")
    return found


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(choices)}.")
