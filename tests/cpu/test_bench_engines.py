"""Engines of the benchmark: what is counted and when, and that transformers computes with our weights, not copies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flexmoe.bench.engines import ExpertCounter, FlexMoE
from flexmoe.bench.hugging_face import DEFAULT, HuggingFace, Setup, candidates, import_transformers
from flexmoe.bench.subject import Changes, Subject, open_subject
from flexmoe.bench.workload import make_prompts
from flexmoe.errors import ConfigError, MissingDependencyError
from tests.cpu.tiny_decoders import NEEDS_COMPILER
from tests.cpu.tiny_models import tiny

OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "threads": 1, "max_num_seqs": 4}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def mixtral() -> Iterator[FlexMoE]:
    with open_subject(str(tiny("mixtral"))) as subject:
        engine = FlexMoE(subject, OPTIONS)
        yield engine
        engine.close()


def prompts(subject: Subject, count: int = 3, length: int = 9) -> list[list[int]]:
    return make_prompts(subject.config.vocab_size, count, length, seed=0)


# ------------------------------------------------------------------------------------------------ workload, subject


def test_prompts_are_seeded_and_nested() -> None:
    few, many = make_prompts(100, 2, 7, seed=1), make_prompts(100, 5, 7, seed=1)
    assert many[:2] == few
    assert all(len(prompt) == 7 and max(prompt) < 100 for prompt in many)
    assert make_prompts(100, 2, 7, seed=2) != few
    assert len({tuple(prompt) for prompt in many}) == 5


@pytest.mark.parametrize("preset", ["mixtral-8x7b", "olmoe-1b-7b"])  # they spell the number of experts differently
def test_a_changed_preset(preset: str) -> None:
    with open_subject(preset, changes=Changes(layers=2, experts=12, top_k=3, expert_width=48)) as subject:
        moe = subject.config.moe
        assert moe is not None
        assert (subject.config.num_layers, moe.num_experts, moe.top_k, moe.expert_width) == (2, 12, 3, 48)
        assert subject.label.startswith(f"{preset} with 2 of ")
        assert subject.load_format == "dummy"
        assert (subject.folder / "config.json").is_file()
    assert not subject.folder.exists()


def test_layer_types_are_cut_with_the_layers() -> None:
    with open_subject(str(tiny("qwen3-odd")), "dummy", Changes(layers=2)) as subject:
        assert [layer.window for layer in subject.config.layers] == [8, None]


def test_weights_fit_one_configuration_only() -> None:
    with pytest.raises(ConfigError, match="layers=4 is above the model's 3"):
        open_subject(str(tiny("qwen3-odd")), "dummy", Changes(layers=4)).__enter__()
    with pytest.raises(ConfigError, match="give a preset"), open_subject(None, changes=Changes(layers=1)):
        pass


# ------------------------------------------------------------------------------------------------ ours


def test_counts_distinct_experts_of_full_steps_alone() -> None:
    counter = ExpertCounter(rows=2)
    counter.record("topk_ids", 0, torch.tensor([[0, 1]]))  # a row has gone: another batch
    counter.record("topk_weights", 0, torch.tensor([[0, 1], [2, 3]]))
    counter.record("topk_ids", 1, torch.tensor([[4, 1], [1, 4]]))
    counter.record("topk_ids", 0, torch.tensor([[0, 1], [1, 2], [5, 6], [-1, -1]]))  # padded with two rows
    counter.record("topk_ids", 0, torch.tensor([[0, 1], [2, 3], [-1, -1]]))
    assert counter.means() == [3.5, 2.0]


def test_every_step_is_seen_and_experts_are_counted(mixtral: FlexMoE) -> None:
    asked = make_prompts(320, 3, 9, seed=0)
    alone = mixtral.distinct_experts(asked[:1], 6)
    assert alone == [2.0, 2.0]  # top-2
    together = mixtral.distinct_experts(asked, 6)
    assert len(together) == 2
    assert all(2 < distinct <= 4 for distinct in together)
    gaps = mixtral.step_seconds(asked, 6)
    assert len(gaps) == 4  # between the five steps that follow the prompts
    assert all(gap > 0 for gap in gaps)
    assert mixtral.generate(asked, 6) == mixtral.generate(asked, 6)


def test_prompts_in_several_steps_are_no_decode_steps() -> None:
    with open_subject(str(tiny("mixtral"))) as subject:
        engine = FlexMoE(subject, OPTIONS | {"max_num_batched_tokens": 10})
        assert len(engine.step_seconds(prompts(subject), 6)) < 4
        assert all(2 < distinct <= 4 for distinct in engine.distinct_experts(prompts(subject), 6))
        engine.close()


# ------------------------------------------------------------------------------------------------ transformers


@NEEDS_COMPILER
@pytest.mark.parametrize("name", ["mixtral", "mixtral-tied", "olmoe", "olmoe-odd", "qwen3_moe", "qwen2_moe", "llama"])
def test_transformers_on_our_weights_gives_our_tokens(name: str) -> None:
    with open_subject(str(tiny(name))) as subject:
        engine = FlexMoE(subject, OPTIONS)
        answers = engine.generate(prompts(subject), 8)
        weights = engine.release()
        theirs = HuggingFace(subject.folder, subject.config, weights)
    asked = prompts(subject)
    plain = [setup for setup in candidates(subject.config, 3, CPU) if not setup.compiled]
    for setup in [DEFAULT, *plain]:
        theirs.use(setup)
        assert theirs.generate(asked, 8) == answers, setup
        assert theirs.generate(asked, 1) == [answer[:1] for answer in answers], setup
    assert theirs.generate(asked[:1], 8) == answers[:1]  # another batch, another static cache


@NEEDS_COMPILER
def test_transformers_holds_no_second_copy() -> None:
    with open_subject(str(tiny("qwen2_moe", dtype="bfloat16")), "dummy") as subject:
        weights = FlexMoE(subject, OPTIONS | {"dtype": "bfloat16"}).release()
        theirs = HuggingFace(subject.folder, subject.config, weights)
    places = [(w.data_ptr(), w.data_ptr() + w.numel() * w.element_size()) for w in weights.values()]
    copies = [
        name
        for name, parameter in theirs._model.named_parameters()
        if not any(start <= parameter.data_ptr() < end for start, end in places)
    ]
    routers = [f"model.layers.{i}.mlp.gate.weight" for i in range(4)]
    assert copies == routers  # bf16 there, fp32 here; what dummies hold is exact in both
    for i, name in enumerate(routers):
        assert torch.equal(theirs._model.get_parameter(name).float(), weights[f"layers.{i}.moe.router.weight"])


def test_weights_in_a_layout_of_their_own_are_not_shared() -> None:
    with open_subject(str(tiny("mixtral"))) as subject:
        engine = FlexMoE(subject, OPTIONS | {"expert_backend": "reference"})
        with pytest.raises(ConfigError, match="packed its weights"):
            engine.release()


def test_candidates() -> None:
    with open_subject("mixtral-8x7b") as subject:
        one, eight = candidates(subject.config, 1, GPU), candidates(subject.config, 8, GPU)
    assert one[0] == Setup("batched_mm", "static", "max-autotune")
    assert eight[0] == Setup("grouped_mm")
    assert str(one[0]) == "batched_mm experts, static cache, torch.compile max-autotune"
    assert len(set(eight)) == len(eight)
    with open_subject(str(tiny("llama"))) as subject:
        assert all(setup.experts is None for setup in candidates(subject.config, 1, GPU))


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match="transformers"):
        import_transformers()
