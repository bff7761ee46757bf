"""`flexmoe verify` passes on every family, and where something is wrong it fails and says where."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from flexmoe.cli.main import main
from flexmoe.engine import batch
from flexmoe.errors import ConfigError, MissingDependencyError, RequestError
from flexmoe.kernels.paged_attention import DecodeGroup, PrefillSpan
from flexmoe.verify.passes import choice_gaps
from flexmoe.verify.recording import Recording
from flexmoe.verify.reference import Reference
from flexmoe.verify.report import Check, Report
from flexmoe.verify.run import VerifyOptions, make_reference, verify
from tests.cpu.tiny_models import CASES, copy_of, edit_config, tiny

# One thread: these models are too small to share, and threads that wait would spin beside other tests.
THREADS, MAX_TOKENS = 1, 32
SCENARIOS = ("alone", "4 together", "20 together", "chunked prefill", "prefix hit", "preempted", "preempted, cached")


def options(folder: Path, **changes: object) -> VerifyOptions:
    fields = {"model": str(folder), "threads": THREADS, "max_tokens": MAX_TOKENS, **changes}
    return VerifyOptions(**fields)  # type: ignore[arg-type]


@functools.cache
def reference(name: str) -> Reference:
    return make_reference(options(tiny(name)))


def outcomes(report: Report) -> dict[str, str]:
    return {check.name: check.outcome for check in report.checks}


def failed(report: Report) -> list[str]:
    return [check.name for check in report.checks if check.outcome == "fail"]


def damage(folder: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """Change every tensor of the checkpoint whose name holds `part`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    names = [name for name in tensors if part in name]
    assert names, f"no tensor of {sorted(tensors)} holds {part!r}"
    save_file(tensors | {name: change(tensors[name]) for name in names}, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", CASES)
def test_every_family_passes_every_check(name: str) -> None:
    report = verify(options(tiny(name)), reference=reference(name))
    assert set(outcomes(report).values()) == {"pass"}, report.to_dict()
    names = " | ".join(outcomes(report))
    assert all(scenario in names for scenario in SCENARIOS)
    assert ("router choices" in names) == CASES[name].is_moe


def test_the_reference_answers_are_not_trivial() -> None:
    for answer in reference("mixtral").answers:
        assert len(answer.tokens) == MAX_TOKENS
        assert len(set(answer.tokens)) > MAX_TOKENS // 4


def _shifted(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 0.05 * tensor.std() * torch.sign(tensor)


@pytest.mark.parametrize(
    ("name", "part", "place"),
    [
        ("mixtral", "embed_tokens", "embedding"),
        ("mixtral", "layers.1.self_attn.v_proj", "layer 1 attention"),
        ("mixtral", "layers.0.block_sparse_moe.experts.2.w2", "layer 0 moe"),
        ("mixtral", "layers.1.input_layernorm", "layer 1 attention"),
        ("qwen2_moe", "layers.2.mlp.shared_expert_gate", "layer 2 moe"),
        ("llama", "layers.1.mlp.down_proj", "layer 1 mlp"),
    ],
)
def test_a_damaged_weight_fails_and_is_placed(name: str, part: str, place: str, tmp_path: Path) -> None:
    folder = damage(copy_of(tiny(name), tmp_path), part, _shifted)
    report = verify(options(folder), reference=reference(name))
    assert not report.passed
    assert f"first difference: {place} is off" in report.verdict
    assert "tokens: alone" in outcomes(report)


def test_a_damaged_router_is_told_from_damaged_experts(tmp_path: Path) -> None:
    folder = damage(copy_of(tiny("mixtral"), tmp_path), "layers.1.block_sparse_moe.gate", torch.neg)
    report = verify(options(folder), reference=reference("mixtral"))
    assert "router choices" in failed(report)
    assert "first difference: layer 1 router chose other experts" in report.verdict


def test_unnormalised_router_weights_are_named(tmp_path: Path) -> None:
    folder = edit_config(copy_of(tiny("olmoe"), tmp_path), norm_topk_prob=True)
    report = verify(options(folder), reference=reference("olmoe"))
    assert "first difference: layer 0 router weights" in report.verdict
    assert outcomes(report)["router choices"] != "pass"  # of the next layer, whose input is wrong


def test_a_damaged_head_shows_in_the_logits_alone(tmp_path: Path) -> None:
    folder = damage(copy_of(tiny("mixtral"), tmp_path), "lm_head", _shifted)
    report = verify(options(folder), reference=reference("mixtral"))
    assert outcomes(report)["hidden states"] == "pass"
    assert failed(report)[0] == "logits"


def test_a_wrong_rope_is_placed_in_the_first_attention(tmp_path: Path) -> None:
    folder = edit_config(
        copy_of(tiny("mixtral"), tmp_path), rope_parameters={"rope_type": "default", "rope_theta": 99.0}
    )
    report = verify(options(folder), reference=reference("mixtral"))
    assert "first difference: layer 0 attention" in report.verdict
    difference = next(check.detail for check in report.checks if check.name == "tokens: alone")
    assert "new token" in difference
    assert "logit is" in difference


def test_another_end_of_sequence_is_a_failure(tmp_path: Path) -> None:
    folder = edit_config(copy_of(tiny("llama"), tmp_path), eos_token_id=7)
    (folder / "generation_config.json").unlink()
    report = verify(options(folder), reference=reference("llama"))
    assert failed(report) == ["end of sequence"]


def test_an_error_in_one_scenario_fails_that_one_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that forget the keys of earlier chunks: right alone, wrong as soon as a prompt is split."""
    right = batch._prefill_span

    def forgetful(*args: object) -> PrefillSpan:
        span = right(*args)  # type: ignore[arg-type]
        if isinstance(span.keys, slice) and span.keys.stop - span.keys.start > span.rows.stop - span.rows.start:
            size = span.rows.stop - span.rows.start
            return PrefillSpan(span.rows, slice(span.keys.stop - size, span.keys.stop), None)
        return span

    monkeypatch.setattr(batch, "_prefill_span", forgetful)
    report = verify(options(tiny("llama")), reference=reference("llama"))
    assert "tokens: chunked prefill" in failed(report)
    assert not {"hidden states", "tokens: alone", "tokens: 4 together"} & set(failed(report))


def test_another_backend_passes_too() -> None:
    report = verify(options(tiny("qwen2_moe"), expert_backend="reference"), reference=reference("qwen2_moe"))
    assert report.passed, report.verdict
    assert report.facts["expert_backend"] == "reference"


def _without_oldest(group: DecodeGroup) -> DecodeGroup:
    if isinstance(group.keys, slice):
        return replace(group, keys=slice(group.keys.start + 1, group.keys.stop))
    return replace(group, keys=group.keys[:, 1:].contiguous(), mask=None if group.mask is None else group.mask[..., 1:])


def test_an_error_in_decoding_alone_is_told_from_one_in_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps that forget the oldest key: the forward pass over the same tokens is right."""
    right = batch._decode_groups

    def forgetful(*args: object) -> list[DecodeGroup]:
        return [_without_oldest(group) for group in right(*args)]  # type: ignore[arg-type]

    monkeypatch.setattr(batch, "_decode_groups", forgetful)
    wrong = options(tiny("mixtral"), expert_backend="reference")
    report = verify(wrong, reference=reference("mixtral"))
    assert outcomes(report)["hidden states"] == "pass"
    assert "decoding: hidden states: first difference: layer 0 attention" in report.verdict


def test_below_fp32_the_forward_pass_is_judged_with_replayed_routing() -> None:
    report = verify(options(tiny("qwen2_moe"), dtype="bfloat16"))
    assert report.passed, report.verdict
    found = outcomes(report)
    assert found["hidden states"] == "pass"
    assert found["router choices"] in ("pass", "tie")
    assert found["tokens: alone"] in ("pass", "info")
    assert "decoding: logits" not in found


def test_below_fp32_a_damaged_weight_still_fails(tmp_path: Path) -> None:
    folder = damage(copy_of(tiny("mixtral"), tmp_path), "layers.1.block_sparse_moe.experts.0.w1", torch.neg)
    wanted = make_reference(options(tiny("mixtral"), dtype="bfloat16"))
    report = verify(options(folder, dtype="bfloat16"), reference=wanted)
    assert "first difference: layer 1 moe" in report.verdict


def test_a_short_prompt_of_ones_own_skips_what_it_cannot_provoke() -> None:
    report = verify(options(tiny("llama"), prompts=("e",), max_tokens=1))
    assert report.passed
    assert "skipped" in outcomes(report).values()
    assert "skipped" in report.verdict


@pytest.mark.parametrize("text", ["", "x" * 200])
def test_a_prompt_that_does_not_fit_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"no tokens|the context of 128"):
        verify(options(tiny("llama"), prompts=(text,)))


def test_options_without_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="no stated tolerances"):
        VerifyOptions(dtype="float16")
    with pytest.raises(ConfigError, match="max_tokens=0"):
        VerifyOptions(max_tokens=0)


def test_without_transformers_the_pip_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'flexmoe\[hf\]'"):
        verify(options(tiny("llama")))


def test_gaps_between_choices() -> None:
    reference = Recording()
    reference.record("router_logits", 0, torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 4 + [[0.0] * 4]))
    reference.record("topk_ids", 0, torch.tensor([[0, 1]] * 5))
    chosen = torch.tensor([[0, 1], [1, 0], [0, 2], [3, 2], [2, 3]])
    *gaps, tied = choice_gaps(chosen, reference, 0).tolist()
    assert gaps == [0.0, 0.0, 1.0, 3.0]
    assert 0 < tied < 1e-6


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["verify", "--threads", str(THREADS), *arguments])


def test_cli_prints_a_table_and_a_verdict() -> None:
    result = run(
        str(tiny("mixtral")), "--max-tokens", "4", "--prompt", "The mixture of experts", "--prompt", "A router"
    )
    assert result.exit_code == 0, result.output
    assert "router choices" in result.output
    assert "PASS: " in result.output


def test_cli_json() -> None:
    result = run(str(tiny("llama")), "--max-tokens", "4", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert found["passed"] is True
    assert found["dtype"] == "float32"
    assert {"name", "outcome", "figure", "limit", "detail"} == set(found["checks"][0])
    assert set(found["versions"]) == {"flexmoe", "torch", "transformers"}


def test_cli_says_by_its_status_that_a_model_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"model": "m", "architecture": "a", "dtype": "float32", "device": "cpu", "versions": {}}
    report = Report(facts, [Check("hidden states", "fail", "1", "0", "layer 3 moe")])
    monkeypatch.setattr("flexmoe.verify.run.verify", lambda *_, **__: report)
    result = run()
    assert result.exit_code == 1
    assert "FAIL: m differs from transformers, in 1 checks. hidden states: layer 3 moe" in result.output.replace(
        "\n", " "
    )
