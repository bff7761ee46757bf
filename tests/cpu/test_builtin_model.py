"""The model that ships: its files, the spellings of its configuration, its measured figures, and what it answers."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "src/flexmoe/assets/builtin"
REPORT = ROOT / "training/results/eval.json"
MAX_BYTES = 38 * 2**20


def _json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def test_checkpoint_fits_and_names_mixtral_tensors():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= MAX_BYTES
    with safe_open(MODEL / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
        assert tensors.get_tensor("model.norm.weight").dtype == torch.bfloat16
    assert "model.layers.5.block_sparse_moe.experts.7.w2.weight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert "lm_head.weight" not in names  # tied


def test_config_has_both_spellings():
    config = _json(MODEL / "config.json")
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    sizes = ("num_attention_heads", "num_key_value_heads", "num_local_experts", "intermediate_size")
    assert all(config[name] % 4 == 0 for name in sizes)


def test_card_names_licence_and_figures():
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert "license: cc-by-sa-4.0" in card
    assert f"{_json(REPORT)['capitals']['plain']['share']:.1%}" in card


def test_report_reaches_its_thresholds():
    report = _json(REPORT)
    assert len(report["losses"]) == 32
    assert report["capitals"]["plain"]["share"] >= 0.8
    assert report["capitals"]["held_out_form"]["share"] >= 0.8
    assert min(min(layer) for layer in report["expert_load"]["layers"]) >= 0.05


@pytest.mark.parametrize("text", ["Hello, world!", "It cost 1234 pounds.\n\n  def f():\n\treturn", "naïve 漢字 🙂", ""])
def test_both_tokenizer_readers_agree(tokenizer, text):
    plain = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = plain.encode(text).ids
    assert tokenizer(text)["input_ids"] == ids
    assert ids[0] == tokenizer.bos_token_id == 1
    assert plain.decode(ids) == text


def test_chat_template_is_the_one_trained_with(tokenizer):
    from training.chat import render

    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == render(chat) == "<s>[INST]Be brief.\n\nOne?[/INST]Two.</s>[INST]Three?[/INST]"
    with pytest.raises(Exception, match="alternate"):
        tokenizer.apply_chat_template(chat[1:2] * 2, tokenize=False)


@pytest.mark.parametrize(("country", "city"), [("France", "Paris"), ("Peru", "Lima")])
def test_answers_capitals(model, tokenizer, country, city):
    chat = [{"role": "user", "content": f"What is the capital of {country}?"}]
    ids = torch.tensor([tokenizer.apply_chat_template(chat, return_dict=False)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :]) == f"The capital of {country} is {city}.</s>"


def test_training_model_computes_what_transformers_does(model):
    from training.export import read_checkpoint
    from training.model import MixtralForTraining, Shape

    ours = MixtralForTraining(Shape()).eval()
    ours.load_state_dict(read_checkpoint(MODEL, ours.shape))
    ids = torch.randint(5, 8192, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], model(ids).logits, atol=1e-4, rtol=0)
