"""The rules of flexmoe.serve that need no model: lengths, sampling, texts, options of the engine, its imports."""

from __future__ import annotations

import ast
import pickle
import warnings
from pathlib import Path

import pytest

import flexmoe.serve
from flexmoe.config.model import ModelConfig
from flexmoe.errors import ConfigError, RequestError
from flexmoe.models.presets import PRESETS
from flexmoe.serve import lengths, translate
from flexmoe.serve.errors import NotServedError
from flexmoe.serve.requests import GenerationConfig, GenerationResult
from flexmoe.serve.text import OutputText
from flexmoe.serve.translate import Limits
from flexmoe.serve.types import DataType

FOLDER = Path(flexmoe.serve.__file__).parent
# The vocabulary, the one face of the engine, what tells a model by its config.json, how much a rank holds of it, and
# who finds a strategy.
ALLOWED = ("flexmoe.config", "flexmoe.errors", "flexmoe.llm", "flexmoe.serve")
ALLOWED += ("flexmoe.models.hub", "flexmoe.models.slices", "flexmoe.planner")
FACE = {"flexmoe.LLM", "flexmoe.RequestOutput"}


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("flexmoe")}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_the_engine_is_reached_through_llm_only(path: Path) -> None:
    assert {name for name in imported(path) - FACE if not name.startswith(ALLOWED)} == set()


# ------------------------------------------------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("max_length", "max_new_tokens", "prompt", "expected"),
    [
        (-1, -1, 10, 245),  # prompt and output: max_seq_length - 1
        (128, -1, 10, 118),
        (11, -1, 10, 1),
        (-1, 32, 10, 32),
        (-1, 255, 10, 246),  # as many as fit
    ],
)
def test_new_tokens(max_length: int, max_new_tokens: int, prompt: int, expected: int) -> None:
    chosen = lengths.choose(max_length, max_new_tokens, 256)
    assert lengths.new_tokens(*chosen, prompt, 256) == expected


def test_both_lengths_warn_and_the_new_tokens_count() -> None:
    with pytest.warns(UserWarning, match="max_new_tokens counts"):
        assert lengths.choose(128, 5, 256) == (-1, 5)


@pytest.mark.parametrize(
    ("max_length", "max_new_tokens", "kind", "said"),
    [
        (256, -1, ValueError, "max_length=256 is not below max_seq_length=256; use at most 255"),
        (-1, 256, ValueError, "max_new_tokens=256 is not below"),
        (0, -1, ValueError, "asks for no token"),
        (-1, -2, ValueError, "asks for no token"),
        ("128", -1, TypeError, "not an integer"),
        (True, -1, TypeError, "not an integer"),
        (None, -1, TypeError, "not an integer"),
    ],
)
def test_wrong_lengths(max_length: int, max_new_tokens: int, kind: type[Exception], said: str) -> None:
    with warnings.catch_warnings(), pytest.raises(kind, match=said) as caught:
        lengths.choose(max_length, max_new_tokens, 256)
    assert isinstance(caught.value, RequestError)


def test_a_prompt_without_room_is_an_error_and_not_lost() -> None:
    with pytest.raises(ValueError, match=r"has 128 tokens, and max_length=128 counts .* at most 127 tokens"):
        lengths.new_tokens(128, -1, 128, 256)
    with pytest.raises(ValueError, match="max_seq_length=256"):
        lengths.new_tokens(-1, 8, 256, 256)


# ------------------------------------------------------------------------------------------------------------ sampling


def test_greedy_whatever_the_rest_says() -> None:
    assert GenerationConfig(temperature=0.9, topp=0.8, topk=7).to_sampling(5).plain_greedy


def test_sampling_takes_topk_from_two_on() -> None:
    assert GenerationConfig(do_sample=True).to_sampling(5).top_k == 0
    params = GenerationConfig(do_sample=True, temperature=0.5, topp=0.7, topk=20).to_sampling(5)
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.7, 20, 5)


def test_a_wrong_number_is_told_in_their_words() -> None:
    with pytest.raises(RequestError, match="topp=0 keeps no token"), translate.speaking_flexflow():
        GenerationConfig(do_sample=True, topp=0).to_sampling(5)


# ---------------------------------------------------------------------------------------------------------- OutputText


def test_output_text_is_bytes_and_text() -> None:
    text = OutputText("naïve 漢字")
    assert isinstance(text, bytes)
    assert text.decode("utf-8") == str(text) == f"{text}" == "%s" % text == "naïve 漢字"  # noqa: UP031
    assert text == "naïve 漢字"
    assert text == "naïve 漢字".encode()
    assert text != "other"
    assert "漢" in text
    assert "漢".encode() in text
    assert "x" not in text
    assert len(text) == len("naïve 漢字".encode())
    assert text + "!" == "naïve 漢字!"
    assert "a " + text == "a naïve 漢字"
    assert text + b"!" == "naïve 漢字!".encode()
    assert text.split(" ") == ["naïve", "漢字"]
    assert text.split(b" ") == ["naïve".encode(), "漢字".encode()]
    assert text.startswith(("x", "na"))
    assert text.replace("ï", "i") == "naive 漢字"
    assert f"{text:>10}" == "  naïve 漢字"
    assert text.encode() == bytes(text)
    assert pickle.loads(pickle.dumps(text)) == text
    assert {bytes(text): 1}[text] == 1
    assert repr(text) == "OutputText('naïve 漢字')"
    with pytest.raises(AttributeError):
        text.nothing  # noqa: B018


def test_results_as_scripts_make_them() -> None:
    assert GenerationResult().output_text is None
    assert GenerationResult(b"a", [1]).output_text == "a"
    assert GenerationResult("a", [1]).output_tokens == [1]
    assert GenerationResult().finetuning_losses == []


# -------------------------------------------------------------------------------------------------- options of engine


@pytest.fixture
def mixtral() -> ModelConfig:
    return next(preset.config for name, preset in PRESETS.items() if "mixtral" in name and preset.config.moe)


def options(config: ModelConfig, cuda: bool = False, **settings: object) -> dict[str, object]:
    limits = Limits(max_requests_per_batch=8, max_seq_length=500, max_tokens_per_batch=100)
    return translate.engine_options(limits, config, settings, dtype="float16", cuda=cuda)


def test_limits_keep_their_numbers(mixtral: ModelConfig) -> None:
    assert options(mixtral) == {
        "dtype": "float16",
        "max_num_seqs": 8,
        "max_model_len": 500,
        "max_num_batched_tokens": 100,
        "block_size": 16,
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "expert_parallel_size": 1,
    }


def test_slots_and_dummy_weights(mixtral: ModelConfig) -> None:
    limits = Limits(num_kv_cache_slots=1000)
    found = translate.engine_options(limits, mixtral, {"benchmarking": True}, dtype="float32", cuda=False)
    assert (found["num_blocks"], found["load_format"]) == (63, "dummy")


@pytest.mark.parametrize(("bits", "name"), [(4, "int4"), (8, "int8")])
def test_quantization_is_that_of_a_cpu(mixtral: ModelConfig, bits: int, name: str) -> None:
    asked = {f"use_{bits}bit_quantization": True}
    assert options(mixtral, **asked)["quantization"] == name
    with pytest.raises(NotServedError, match=f"use_{bits}bit_quantization=True: weights are quantized on a CPU only"):
        options(mixtral, cuda=True, **asked)


def test_a_context_longer_than_the_models_is_cut_with_a_warning(
    mixtral: ModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    found = translate.engine_options(Limits(max_seq_length=10**6), mixtral, {}, dtype="float16", cuda=False)
    assert found["max_model_len"] == mixtral.max_position
    assert "above this model's context" in caplog.text


def test_memory_per_gpu_is_a_cap_on_weights_and_cache(mixtral: ModelConfig) -> None:
    weights = mixtral.num_parameters() * 2 // 2**20
    assert options(mixtral, cuda=True, memory_per_gpu=2 * weights)["num_blocks"] == 8 * 32
    tight = options(mixtral, cuda=True, memory_per_gpu=weights + 100)["num_blocks"]
    assert isinstance(tight, int)
    assert 32 <= tight < 8 * 32
    with pytest.raises(ConfigError, match=r"cannot hold .* raise it to \d+"):
        options(mixtral, cuda=True, memory_per_gpu=weights)
    assert "num_blocks" not in options(mixtral, memory_per_gpu=weights)  # it says GPU


@pytest.mark.parametrize("degree", ["pipeline", "tensor", "data"])
def test_memory_per_gpu_is_that_of_each_rank(mixtral: ModelConfig, degree: str) -> None:
    """Two stages or slices halve weights and cache; data ranks share nothing but the experts."""
    weights = mixtral.num_parameters() * 2 // 2**20
    given = {f"{degree}_parallelism_degree": 2, "expert_parallelism_degree": 2 if degree == "data" else 1}
    found = options(mixtral, cuda=True, memory_per_gpu=weights * 6 // 10, **given)
    assert found[f"{degree}_parallel_size"] == 2
    assert found["num_blocks"] == 8 * 32
    with pytest.raises(ConfigError, match=r"cannot hold .* raise it to \d+"):
        options(mixtral, cuda=True, memory_per_gpu=weights * 4 // 10, **given)


@pytest.mark.parametrize(
    ("strategy", "experts", "expected"),
    [("auto", 1, 1), ("auto", 2, 2), ("tensor", 1, 1), ("expert", 1, 4), ("expert", 4, 4), ("hybrid", 2, 2)],
)
def test_strategies(strategy: str, experts: int, expected: int) -> None:
    given = {"tensor_parallelism_degree": 2, "data_parallelism_degree": 2, "expert_parallelism_degree": experts}
    sizes = translate.parallel_sizes({**given, "moe_strategy": strategy, "pipeline_parallelism_degree": 3})
    assert sizes["expert_parallel_size"] == expected
    assert (sizes["tensor_parallel_size"], sizes["data_parallel_size"], sizes["pipeline_parallel_size"]) == (2, 2, 3)


@pytest.mark.parametrize(("strategy", "experts"), [("tensor", 2), ("expert", 2), ("hybrid", 1), ("hybrid", 4)])
def test_strategies_that_do_not_go_together(strategy: str, experts: int) -> None:
    with pytest.raises(ConfigError, match="do not go together; use expert_parallelism_degree="):
        translate.parallel_sizes(
            {"tensor_parallelism_degree": 4, "expert_parallelism_degree": experts, "moe_strategy": strategy}
        )


def test_one_rank_has_one_strategy() -> None:
    assert translate.parallel_sizes({"moe_strategy": "hybrid"})["expert_parallel_size"] == 1


def test_half_precision_is_the_checkpoints_own_on_a_cpu() -> None:
    assert translate.dtype(DataType.DT_HALF, cuda=True) == "float16"
    assert translate.dtype(DataType.DT_HALF, cuda=False) == "auto"
    assert translate.dtype(DataType.DT_BFLOAT16, cuda=False) == "bfloat16"


@pytest.mark.parametrize(("data_type", "kind"), [("half", TypeError), (DataType.DT_INT8, ValueError)])
def test_wrong_data_types(data_type: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="DT_HALF"):
        translate.data_type_name(data_type)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("max_requests_per_batch", 0, ValueError),
        ("max_seq_length", 1, ValueError),
        ("max_tokens_per_batch", "64", TypeError),
        ("num_kv_cache_slots", -2, ValueError),
    ],
)
def test_wrong_limits(name: str, value: object, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=name):
        Limits(**{name: value})  # type: ignore[arg-type]
