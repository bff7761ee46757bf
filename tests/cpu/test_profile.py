"""`flexmoe profile`: stages of a step on a CPU, kernels by operation, shares and percentages, the trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from flexmoe.bench import profile
from flexmoe.bench.engines import FlexMoE
from flexmoe.bench.kernel_operations import Kernel, operations_of
from flexmoe.bench.profile import GAPS, Event, ProfileOptions, operation_bytes, operations
from flexmoe.bench.subject import open_subject
from flexmoe.cli.main import main
from flexmoe.errors import ConfigError
from flexmoe.models.presets import PRESETS

# A step of two layers as the fused decoder launches it: one row with splits that are added up, then many rows.
FEW = """_embed _gemv _reduce split_kernel merge_kernel _gemv _reduce_norm _route_few _gate_up_gemv _down_gemv _rms_norm
_direct split_kernel _direct _route_few _gate_up_gemv _down_gemv _rms_norm _direct _peaks _first""".split()
MANY = """_embed
_direct split_kernel _direct _route_many _topk _group_by_expert _gate_up_grouped _down_grouped _combine_norm
_direct split_kernel _direct _route_many _topk _group_by_expert _gate_up_grouped _down_grouped _combine_norm _direct
_reduce _peaks _first""".split()


def named(names: list[str]) -> list[tuple[str, int]]:
    return operations_of([Kernel(name, float(start), 1.0) for start, name in enumerate(names)])


def test_kernels_of_a_step_belong_to_their_operations() -> None:
    assert named(FEW) == [
        *[("embedding", -1), ("QKV", 0), ("QKV", 0), ("attention", 0), ("attention", 0)],
        *[("output projection", 0), ("output projection", 0), ("router", 0), ("experts", 0), ("experts", 0)],
        *[("norms", 0), ("QKV", 1), ("attention", 1), ("output projection", 1), ("router", 1), ("experts", 1)],
        *[("experts", 1), ("norms", 1), ("head", -1), ("sampler", -1), ("sampler", -1)],
    ]
    many = named(MANY)
    assert [operation for operation, layer in many if layer == 1] == [
        *["QKV", "attention", "output projection", "router", "dispatch", "dispatch"],
        *["experts", "experts", "combine"],
    ]
    assert many[-4:] == [("head", -1), ("head", -1), ("sampler", -1), ("sampler", -1)]


def test_layers_begin_anew_with_each_step() -> None:
    assert named(MANY + FEW) == named(MANY) + named(FEW)


def test_a_kernel_that_nobody_knows_is_told_as_such() -> None:
    assert named(["_embed", "something_new", "Memcpy DtoH (Device -> Pinned)"])[1:] == [("other", -1), ("copies", -1)]


def test_shares_gaps_and_percentages() -> None:
    """Two steps of 10 s: 4 s of experts each, and 2 s of attention of which 1 s beside the experts."""
    events = [
        Event(name, name, 0, start + step, seconds)
        for step in (0.0, 10.0)
        for name, start, seconds in (("experts", 1.0, 4.0), ("attention", 4.0, 2.0))
    ]
    rows = operations(events, [10.0, 10.0], {"experts": 100}, ceiling=50.0)
    assert [(row["operation"], row["us"], row["calls"], row["share_percent"]) for row in rows] == [
        (GAPS, 5e6, 0, 50.0),
        ("experts", 4e6, 1, 40.0),
        ("attention", 2e6, 1, 20.0),
    ]
    assert rows[1]["percent_of_bandwidth"] == 50.0
    assert "bytes" not in rows[2]


def test_bytes_of_operations_are_those_of_the_floor() -> None:
    config = PRESETS["olmoe-1b-7b"].config
    read = operation_bytes(config, 1, 128, 2, [8.0] * 16)
    assert read["QKV"] == 16 * 2048 * (16 * 3 * 128) * 2
    assert read["experts"] == 16 * 8 * 3 * 2048 * 1024 * 2
    assert read["head"] == 50304 * 2048 * 2
    assert read["attention with projections"] == read["QKV"] + read["output projection"] + read["attention"]


@pytest.mark.parametrize("torch_path", [False, True])
def test_stages_of_a_cpu(torch_path: bool) -> None:
    options = ProfileOptions(batch=2, prompt_len=8, steps=2, device="cpu", threads=1, torch_path=torch_path)
    found = profile.measure(options)
    by_name = {row["operation"]: row for row in found.row["result"]["operations"]}
    if torch_path or found.row["config"]["decode_kernels"].startswith("torch"):
        assert {"router", "dispatch", "experts", "combine"} <= by_name.keys()
    else:
        assert by_name["experts with router"]["calls"] == 6
    assert by_name["attention with projections"]["calls"] == 6
    assert {"head", "sampler", GAPS} <= by_name.keys()
    spent = sum(row["us"] for row in by_name.values())
    assert spent == pytest.approx(1e3 * found.row["result"]["step_ms"], rel=0.02)
    assert {event.layer for event in found.events} == {-1, *range(6)}


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.json", tmp_path / "rows.jsonl"
    words = f"profile --batch 1 --prompt-len 8 --steps 1 --device cpu --threads 1 --trace {trace} --out {out}"
    done = CliRunner().invoke(main, words.split(), catch_exceptions=False)
    assert done.exit_code == 0
    assert "host gaps" in done.output
    events = json.loads(trace.read_text())["traceEvents"]
    lines = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    assert spans
    assert all(lines[event["tid"]] == event["cat"] for event in spans)
    assert [event["ts"] for event in spans] == sorted(event["ts"] for event in spans)
    assert json.loads(out.read_text())["benchmark"] == "profile"


def test_a_preset_with_fewer_layers(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    words = "profile tinymistral-6x248m --layers 2 --prompt-len 4 --steps 1 --device cpu --threads 1 --dtype float32"
    done = CliRunner().invoke(main, [*words.split(), "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "tinymistral-6x248m with 2 of 12 layers" in done.output
    row = json.loads(out.read_text())
    assert row["model"]["layers"] == 2
    (attention,) = (one for one in row["result"]["operations"] if one["operation"] == "attention with projections")
    assert attention["calls"] == 2
    refused = CliRunner().invoke(main, "profile --layers 2 --device cpu".split())
    assert refused.exit_code == 1
    assert "changes of a model fit no stored weights" in refused.output


def test_the_path_in_torch_is_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(profile, "set_threads", lambda _: None)
    with pytest.raises(ConfigError, match="the path in PyTorch is for a CPU"):
        profile.measure(ProfileOptions(torch_path=True))


def test_the_engine_is_in_the_middle_of_decoding() -> None:
    with open_subject(None) as subject:
        ours = FlexMoE(subject, {"device": "cpu", "threads": 1, "max_num_seqs": 2, "max_model_len": 64})
        profile.begin(ours.engine, [[1, 5], [1, 6, 7]], steps=3)
        for _ in range(3):
            assert ours.engine.has_unfinished
            ours.engine.step()
        ours.close()
