"""config.json to ModelConfig: both spellings, defaults, refusals by name, and no torch on the way."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexmoe.config.model import ModelConfig, RopeConfig
from flexmoe.errors import ConfigError, FlexMoEError, UnsupportedModelError
from flexmoe.models import families
from flexmoe.models.families._reader import HARMLESS, REFUSED
from tests.cpu.tiny_models import CASES

ARCHITECTURES = {name: family.architecture for name, family in families.FAMILIES.items()}


def config_json(case: str, **changes: Any) -> dict[str, Any]:
    """A case as config.json would have it; a change to `...` takes the key away."""
    model_type = CASES[case].model_type
    base = {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type, "dtype": "float32"}
    merged = {**base, **CASES[case].config, **changes}
    return {key: value for key, value in merged.items() if value is not ...}


def read(case: str, **changes: Any) -> ModelConfig:
    return families.read_config(config_json(case, **changes))


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_read_and_its_parameters_add_up(case: str) -> None:
    config = read(case)
    assert config.architecture == ARCHITECTURES[CASES[case].model_type]
    assert config.eos_token_ids == (1,)
    assert config.bos_token_id == 0
    sizes = {name: math.prod(p.shape) for name, p in families.parameters(config).items()}
    assert sum(sizes.values()) == config.num_parameters()
    filled = {piece for piece in families.tensors(config).values() if not piece.fused}
    assert sum(math.prod(piece.shape) for piece in filled) == config.num_parameters()


@pytest.mark.parametrize("case", CASES)
def test_old_spelling_means_the_same(case: str) -> None:
    new = config_json(case)
    rope = dict(new.get("rope_parameters", {}))
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    if "rope_theta" in rope:
        old["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type", "default")
    old |= {"rope_scaling": None if kind == "default" else {"type": kind, **rope}, "torch_dtype": "torch.float32"}
    assert families.read_config(old) == families.read_config(new)


def test_rope_of_each_kind() -> None:
    assert read("llama").attention.rope == RopeConfig(theta=10000.0, rotary_dim=16)
    linear = read("llama-linear")
    assert linear.attention.rope == RopeConfig(theta=10000.0, rotary_dim=16, kind="linear", factor=4.0)
    assert linear.max_position == 4 * 128
    dynamic = read("llama-dynamic")
    assert dynamic.attention.rope.kind == "dynamic"
    assert dynamic.attention.rope.original_max_position == 16
    assert dynamic.max_position == 16
    llama3 = read("llama-tied-llama3")
    assert llama3.attention.rope == RopeConfig(
        theta=500000.0, rotary_dim=32, kind="llama3", factor=8.0, original_max_position=32, low_freq_factor=1.0,
        high_freq_factor=4.0,
    )  # fmt: skip
    assert llama3.max_position == 128
    assert read("qwen3-odd").attention.rope == RopeConfig(
        theta=1000.0, rotary_dim=32, kind="yarn", factor=4.0, original_max_position=32, beta_fast=16.0, beta_slow=2.0,
        mscale=0.8, mscale_all_dim=0.5, truncate=False,
    )  # fmt: skip


def test_yarn_fills_in_what_is_left_out() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    config = read("llama", rope_parameters=yarn)
    assert config.attention.rope.original_max_position == 128
    assert config.max_position == 512
    top = read("llama", rope_parameters=yarn, original_max_position_embeddings=64)
    assert top.attention.rope.original_max_position == 64
    ratio = {"rope_type": "yarn", "original_max_position_embeddings": 32, "beta_fast": 0, "finetuned": True}
    rope = read("llama", rope_parameters=ratio).attention.rope
    assert (rope.factor, rope.beta_fast, rope.attention_factor) == (4.0, 32.0, None)


def test_theta_inside_wins_and_scaling_wins_over_parameters() -> None:
    assert read("llama", rope_theta=5.0, rope_parameters={"rope_theta": 7.0}).attention.rope.theta == 7.0
    assert read("llama", rope_theta=5, rope_parameters={}).attention.rope.theta == 5.0
    both = read("llama", rope_scaling={"type": "linear", "factor": 2}, rope_parameters={"rope_type": "default"})
    assert both.attention.rope.factor == 2.0


def test_defaults_are_the_family_s_own() -> None:
    assert read("mixtral", rope_parameters=...).attention.rope.theta == 1e6
    assert read("llama", rope_parameters=...).attention.rope.theta == 1e4
    assert windows(read("mistral", sliding_window=...)) == [4096, 4096]
    assert windows(read("mistral", sliding_window=None)) == [None, None]
    assert windows(read("mixtral", sliding_window=...)) == [None, None]
    assert read("qwen3", head_dim=...).attention.head_dim == 128
    assert read("qwen2", head_dim=...).attention.head_dim == 16
    assert read("llama", num_key_value_heads=...).attention.num_kv_heads == 4
    assert read("llama", num_key_value_heads=None).attention.num_kv_heads == 4
    assert read("qwen2_moe").attention.qkv_bias
    assert not read("qwen2_moe").moe.renormalize  # type: ignore[union-attr]
    assert read("mixtral").moe.renormalize  # type: ignore[union-attr]
    assert [read(case).norm_eps for case in ("mixtral", "olmoe", "llama", "qwen3_moe")] == [1e-5, 1e-5, 1e-6, 1e-6]
    assert not read("llama", tie_word_embeddings=...).tie_embeddings


def test_windows_by_layer() -> None:
    assert windows(read("mixtral-window")) == [8, 8]
    assert windows(read("qwen2-window")) == [None, 8, 8]
    assert windows(read("qwen2-window", use_sliding_window=False)) == [None] * 3
    assert windows(read("qwen2_moe-odd")) == [8, None, 8, None]
    assert windows(read("qwen2_moe-odd", max_window_layers=1)) == [8, None, None, None]
    assert windows(read("qwen3_moe-window", max_window_layers=1)) == [8, 8]
    assert windows(read("qwen3-odd")) == [8, None, 8]


def test_moe_and_dense_layers() -> None:
    assert [layer.is_moe for layer in read("qwen2_moe-sparse").layers] == [False, True, False, True]
    assert [layer.is_moe for layer in read("qwen2_moe-odd").layers] == [True, False, True, True]
    assert [layer.is_moe for layer in read("qwen3_moe-odd").layers] == [False, True]
    assert read("qwen3_moe", mlp_only_layers=[0, 1]).moe is None
    shared = read("qwen2_moe").moe
    assert shared is not None
    assert (shared.shared_width, shared.shared_gate, shared.expert_width) == (80, True, 32)


def test_number_of_experts_under_both_names() -> None:
    for case in ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe"):
        for name in ("num_experts", "num_local_experts"):
            config = read(case, **{"num_experts": ..., "num_local_experts": ..., name: 5})
            assert config.moe is not None
            assert config.moe.num_experts == 5
    with pytest.raises(ConfigError, match="num_experts=4 and num_local_experts=5 are the same option"):
        read("mixtral", num_experts=4, num_local_experts=5)


def test_end_of_sequence_tokens() -> None:
    assert read("llama", eos_token_id=[5, 6]).eos_token_ids == (5, 6)
    assert read("llama", eos_token_id=None).eos_token_ids == ()
    config = config_json("llama")
    assert families.read_config(config, {"eos_token_id": [7, 8]}).eos_token_ids == (7, 8)
    assert families.read_config(config, {"eos_token_id": 9}).eos_token_ids == (9,)
    assert families.read_config(config, {"temperature": 0.5}).eos_token_ids == (1,)
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id='x'"):
        families.read_config(config, {"eos_token_id": "x"})


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported for a llama model; supported: 'silu'"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config={'quant_method': 'gptq'}"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'.*default, linear, dynamic, yarn"),
    ("llama", {"rope_parameters": {"mrope_section": [1, 2]}}, r"mrope_section=\[1, 2\]"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention="),
    ("llama", {"sliding_window": 8}, "sliding_window=8"),
    ("llama", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types="),
    ("llama", {"num_experts": 4}, "num_experts=4"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    ("llama", {"dtype": "float64"}, "dtype='float64'.*float32, bfloat16, float16"),
    ("mistral", {"attention_bias": True}, "attention_bias=true is not supported for a mistral model"),
    ("mistral", {"mlp_bias": True}, "mlp_bias=true"),
    ("mistral-window", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
    ("mixtral", {"norm_topk_prob": False}, "norm_topk_prob=false"),
    ("mixtral", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
    ("mixtral", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
    ("olmoe", {"sliding_window": 4}, "sliding_window=4"),
    ("olmoe", {"head_dim": 32}, "head_dim=32.*supported: 16"),
    ("qwen2", {"qkv_bias": False}, "qkv_bias=false"),
    ("qwen2", {"layer_types": ["chunked_attention"] * 2}, "layer_types='chunked_attention'"),
    ("qwen2_moe", {"attention_bias": True}, "attention_bias=true"),
    ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
    ("qwen3_moe", {"n_group": 4}, "n_group=4"),
]


@pytest.mark.parametrize(("case", "changes", "message"), REFUSALS)
def test_features_that_are_not_there_are_refused_by_name(case: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read(case, **changes)


MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hidden_size": ...}, "config.json: hidden_size is missing; a llama model needs it"),
    ("llama", {"hidden_size": None}, "hidden_size is null"),
    ("llama", {"hidden_size": "64"}, "hidden_size='64' is not an integer"),
    ("llama", {"hidden_size": True}, "hidden_size=True is not an integer"),
    ("llama", {"hidden_size": 64.0}, r"hidden_size=64\.0 is not an integer"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0 is not a positive integer"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
    ("llama", {"num_attention_heads": 6}, "num_attention_heads=6 does not divide hidden_size=64"),
    ("llama", {"head_dim": 15}, "head_dim=15 is odd"),
    ("llama", {"rms_norm_eps": -1}, "rms_norm_eps=-1 is not above 0"),
    ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps=nan is not a finite number"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' is not true or false"),
    ("llama", {"eos_token_id": [1, "2"]}, "eos_token_id="),
    ("llama", {"rope_parameters": [1]}, "rope_parameters=.* is not an object"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "config.json: rope_parameters: factor is missing"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling: factor=0 is not above 0"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor is missing"),
    ("llama", {"rope_theta": -5.0, "rope_parameters": ...}, "rope_theta=-5 is not above 0"),
    ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 is above the number of experts, 4"),
    ("mistral", {"sliding_window": 0}, "sliding_window=0 is not a positive integer"),
    ("qwen2-window", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for num_hidden_layers=3"),
    ("qwen3-odd", {"use_sliding_window": False}, "layer_types asks for sliding_attention"),
    ("qwen3_moe", {"mlp_only_layers": "0"}, "mlp_only_layers='0'"),
    ("llama", {"model_type": "qwen2"}, "belongs to model_type='llama', but model_type='qwen2'"),
    ("llama", {"model_type": ..., "architectures": ...}, "neither architectures nor model_type"),
]


@pytest.mark.parametrize(("case", "changes", "message"), MALFORMED)
def test_malformed_values_are_named(case: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(case, **changes)


def test_unknown_architectures_name_the_known_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'Gemma3ForCausalLM' is not supported; .*MixtralForCausalLM"):
        read("llama", architectures=["Gemma3ForCausalLM"], model_type="gemma3")
    with pytest.raises(UnsupportedModelError, match="model_type 'gemma3' is not supported"):
        read("llama", architectures=..., model_type="gemma3")
    with pytest.raises(UnsupportedModelError, match="LlamaForSequenceClassification"):
        read("llama", architectures=["LlamaForSequenceClassification"])
    assert read("llama", architectures=...).family == "llama"
    assert read("llama", model_type=...).family == "llama"


def test_unknown_keys_are_named_in_the_log_and_harmless_ones_are_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="flexmoe.models"):
        read(
            "llama", use_cache=True, pretraining_tp=2, attention_dropout=0.1, mlp_bias=False, partial_rotary_factor=1.0
        )
        assert not caplog.records
        read("llama", zebra=1, my_note="x", empty=None)
    assert [record.getMessage() for record in caplog.records] == [
        "config.json: unknown options, without effect here: my_note, zebra"
    ]


def test_a_key_is_either_harmless_or_refused() -> None:
    assert not HARMLESS & REFUSED.keys()


def test_names_and_places_of_tensors() -> None:
    mixtral = families.tensors(read("mixtral"))
    up = mixtral["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    assert (up.param, up.shape, up.start, up.expert) == ("layers.1.moe.experts.gate_up", (48, 64), 48, 3)
    assert mixtral["model.layers.1.mlp.experts.3.up_proj.weight"] == up
    assert mixtral["model.layers.1.mlp.experts.gate_up_proj"].shape == (4, 96, 64)
    llama = families.tensors(read("llama-mha-bias"))
    k = llama["model.layers.0.self_attn.k_proj.bias"]
    assert (k.param, k.shape, k.start, k.expert) == ("layers.0.attention.qkv.bias", (64,), 64, None)
    assert "model.layers.0.self_attn.k_proj.bias" not in families.tensors(read("llama"))
    assert "lm_head.weight" not in families.tensors(read("qwen2"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=5,
)
ROPE_KEYS = st.sampled_from(
    """rope_type type factor rope_theta low_freq_factor high_freq_factor beta_fast truncate attention_factor mscale
    original_max_position_embeddings partial_rotary_factor""".split()
)
ROPE = st.dictionaries(ROPE_KEYS, JSON | st.sampled_from(["linear", "dynamic", "yarn", "llama3"]), max_size=5)


@given(
    case=st.sampled_from(sorted(CASES)),
    key=st.sampled_from(sorted({key for name in CASES for key in config_json(name)} | REFUSED.keys())),
    value=JSON,
    rope=st.none() | ROPE,
)
def test_any_config_is_read_or_refused(case: str, key: str, value: Any, rope: dict[str, Any] | None) -> None:
    changes = {} if rope is None else {"rope_scaling": rope}
    try:
        config = read(case, **changes, **{key: value})
    except FlexMoEError as error:
        assert len(str(error)) > 20  # noqa: PT017 (the error is one of two right outcomes)
    else:
        assert config.num_layers >= 1


def test_families_and_presets_import_no_torch() -> None:
    code = "import sys, flexmoe.models.presets; print({'torch', 'transformers', 'triton'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
