"""EngineConfig: flat option names find their part; ranges, choices and flags are checked, unknown names refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from flexmoe.config.engine import CacheConfig, DeviceConfig, EngineConfig, LaunchConfig, LoadConfig, SchedulerConfig
from flexmoe.config.plan import ExpertPlacement, ParallelPlan
from flexmoe.errors import ConfigError, UnknownOptionError

# For each part, every option of it with a value that is not its default.
PARTS: dict[str, tuple[type, dict[str, Any]]] = {
    "cache": (
        CacheConfig,
        {"block_size": 8, "kv_cache_memory": 2**20, "num_blocks": 7, "enable_prefix_caching": False},
    ),
    "scheduler": (
        SchedulerConfig,
        {"max_num_seqs": 3, "max_num_batched_tokens": 99, "max_model_len": 50, "max_decode_slowdown": 3.0},
    ),
    "device": (
        DeviceConfig,
        {
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "expert_backend": "reference",
            "isa": "portable",
            "quantization": "int8",
            "one_pass": True,
            "prompts_ahead": False,
            "compile_ahead": False,
        },
    ),
    "load": (
        LoadConfig,
        {
            "model": "folder",
            "load_format": "dummy",
            "revision": "v2",
            "download_dir": "cache",
            "force_download": True,
            "progress": True,
        },
    ),
    "parallel": (ParallelPlan, {}),  # some of its defaults only, and degrees that go together: tested below
    "launch": (LaunchConfig, {"launcher": "spawn", "worker_timeout": 5.0}),
}
COUNTS = ["block_size"]
OPTIONAL_COUNTS = [
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_memory",
    "num_blocks",
    "max_model_len",
    "threads",
]
DEGREES = ["tensor_parallel_size", "expert_parallel_size", "pipeline_parallel_size", "data_parallel_size"]
FLAGS = ["enable_prefix_caching", "one_pass", "prompts_ahead", "compile_ahead", "force_download", "progress"]
TEXTS = ["device", "download_dir", "model", "revision"]


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        EngineConfig.from_options(options)
    return str(error.value)


@pytest.mark.parametrize("value", [1, 0.5, -2.0, True, "2", None])
def test_a_slowdown_that_is_none_is_refused(value: object) -> None:
    assert f"max_decode_slowdown={value!r} is not a number above 1" in refusal(max_decode_slowdown=value)


def test_seats_are_what_the_device_takes_unless_somebody_says() -> None:
    assert [SchedulerConfig().on(kind).seats for kind in ("cuda", "cpu")] == [512, 64]
    assert SchedulerConfig(max_num_seqs=3).on("cuda") == SchedulerConfig(max_num_seqs=3)


def test_no_options_give_the_defaults() -> None:
    assert EngineConfig.from_options({}) == EngineConfig()


@pytest.mark.parametrize("part", PARTS)
def test_each_option_reaches_its_part(part: str) -> None:
    kind, values = PARTS[part]
    assert values.keys() == {f.name for f in fields(kind)} or part == "parallel"
    for name, value in values.items():
        assert getattr(kind(), name) != value
        config = EngineConfig.from_options({name: value})
        assert getattr(config, part) == kind(**{name: value})
        assert [p for p in PARTS if getattr(config, p) != PARTS[p][0]()] == [part]
    assert getattr(EngineConfig.from_options({**values, "seed": 5}), part) == kind(**values)


def test_option_names_are_unique_among_the_parts() -> None:
    names = [f.name for kind, _ in PARTS.values() for f in fields(kind)]
    assert sorted(names) == sorted({*names} - {"seed"})


def test_an_unknown_option_names_the_nearest_known_one() -> None:
    with pytest.raises(UnknownOptionError) as error:
        EngineConfig.from_options({"max_num_seq": 4})
    assert str(error.value) == "LLM has no option 'max_num_seq'; did you mean 'max_num_seqs'?"
    assert "did you mean 'seed'" in refusal(seeds=1)
    everything = refusal(zzz=1)
    assert all(f.name in everything for kind, _ in PARTS.values() for f in fields(kind))
    assert "seed" in everything


@pytest.mark.parametrize("name", COUNTS + OPTIONAL_COUNTS + DEGREES)
@pytest.mark.parametrize("value", [0, -1, 1.0, "8", True])
def test_a_count_is_a_positive_integer(name: str, value: object) -> None:
    assert refusal(**{name: value}) == f"{name}={value!r} is not a positive integer."


@pytest.mark.parametrize("name", COUNTS + OPTIONAL_COUNTS + DEGREES)
def test_a_count_may_be_1(name: str) -> None:
    EngineConfig.from_options({name: 1})


@pytest.mark.parametrize("name", COUNTS + DEGREES)
def test_none_is_no_count(name: str) -> None:
    assert refusal(**{name: None}) == f"{name}=None is not a positive integer."


@pytest.mark.parametrize("name", OPTIONAL_COUNTS)
def test_none_leaves_a_count_to_the_engine(name: str) -> None:
    assert EngineConfig.from_options({name: None}) == EngineConfig()


def test_degrees_and_dispatch_reach_the_plan() -> None:
    options = {"tensor_parallel_size": 4, "expert_parallel_size": 2, "moe_dispatch": "all_to_all"}
    assert EngineConfig.from_options(options).parallel == ParallelPlan(4, 2, moe_dispatch="all_to_all")


def test_a_plan_is_given_whole(tmp_path: Path) -> None:
    plan = ParallelPlan(2, 2, placements={None: ExpertPlacement(3, ((0, 1), (2,)))})
    plan.write(tmp_path / "plan.json")
    for given in (plan, plan.to_json(), tmp_path / "plan.json", str(tmp_path / "plan.json")):
        assert EngineConfig.from_options({"plan": given}).parallel == plan
    assert EngineConfig.from_options({"plan": plan, "tensor_parallel_size": 2}).parallel == plan
    said = "tensor_parallel_size=4, but the plan says 2; give one of them."
    assert refusal(plan=plan, tensor_parallel_size=4) == said


@pytest.mark.parametrize("value", [0, -1.0, "1", True, None, float("nan")])
def test_a_timeout_is_a_positive_number(value: object) -> None:
    assert refusal(worker_timeout=value) == f"worker_timeout={value!r} is not a positive number of seconds."


@pytest.mark.parametrize("name", ["torchrun", "ray"])
def test_a_launcher_of_ranks_needs_ranks(name: str) -> None:
    assert refusal(launcher=name).startswith(f"launcher={name!r} starts ranks, but the plan has one")


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("dtype", "auto, float32, bfloat16, float16"),
        ("load_format", "auto, safetensors, dummy"),
        ("expert_backend", "auto, reference, cpu, triton"),
        ("launcher", "auto, spawn, torchrun, ray"),
        ("isa", "auto, portable, avx2, avx512, avx512_bf16, neon"),
    ],
)
def test_a_choice_is_one_of_those_listed(name: str, choices: str) -> None:
    for value in choices.split(", "):
        EngineConfig.from_options({name: value, "tensor_parallel_size": 2})
    assert refusal(**{name: "best"}) == f"{name}='best' is not one of {choices}."
    assert refusal(**{name: None}) == f"{name}=None is not one of {choices}."


def test_weights_are_quantized_to_what_is_listed_or_not_at_all() -> None:
    for value in ("int8", "int4", None):
        assert EngineConfig.from_options({"quantization": value}).device.quantization == value
    assert refusal(quantization="int3") == "quantization='int3' is not one of int8, int4."


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", ["false", 0, None])
def test_a_flag_is_true_or_false(name: str, value: object) -> None:
    assert refusal(**{name: value}) == f"{name}={value!r} is neither True nor False."


@pytest.mark.parametrize("name", TEXTS)
def test_a_name_is_a_string(name: str) -> None:
    assert refusal(**{name: 3}) == f"{name}=3 is not a string."


def test_a_device_has_a_name_always() -> None:
    assert refusal(device=None) == "device=None is not a string."


def test_the_model_may_be_a_path(tmp_path: Path) -> None:
    assert EngineConfig.from_options({"model": tmp_path}) == EngineConfig.from_options({"model": str(tmp_path)})


@pytest.mark.parametrize("value", [1.0, "0", True, None])
def test_the_seed_is_an_integer(value: object) -> None:
    assert refusal(seed=value) == f"seed={value!r} is not an integer."


def test_any_integer_is_a_seed() -> None:
    assert [EngineConfig.from_options({"seed": seed}).seed for seed in (-1, 0, 2**70)] == [-1, 0, 2**70]
