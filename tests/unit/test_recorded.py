"""Floors of rows that hold none: by hand, beside those that newer rows hold, and why there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexmoe.planner.recorded import (
    NOT_COUNTED,
    UNKNOWN_MACHINE,
    UNKNOWN_MODEL,
    NoFloorError,
    Speed,
    recorded_model,
    served_floor,
    served_needs,
    slice_needs,
    step_needs,
)
from flexmoe.report.floors import served_percents, step_percent
from flexmoe.report.rows import Cell, Row

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H200 = {"kind": "cuda", "name": "NVIDIA H200"}
MIXTRAL = {"name": "mixtral-8x7b", "parameters": 46_702_792_704, "layers": 32, "experts": 8, "top_k": 2}
# Of the published shape, in bf16: attention, two norms and the router of a layer; one expert of a layer; the head and
# the last norm; one row of the embedding; keys and values of a token.
LAYER = 2 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 2 * 4096 + 8 * 4096)
EXPERT = 2 * 3 * 4096 * 14336
OUTSIDE = 2 * (32000 * 4096 + 4096)
EMBEDDED = 2 * 4096
KEPT = 2 * 2 * 8 * 128 * 32


def step(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": MIXTRAL,
        "params": {"batch": 1, "prompt_len": 64, "output_len": 64, "dtype": "bfloat16"},
        "config": {"ranks": 2},
        "result": {"step_ms": {"median": 4.0}},
        "device": H200,
    }
    return row | changes


def served(**changes: Any) -> dict[str, Any]:
    """Ten answers of 101 tokens to prompts of 256, of which 56 were known: five together, at 20 ms a token."""
    result = {
        "succeeded": 10, "prompt_tokens": 2560, "cached_tokens": 560, "output_tokens": 1010,
        "output_tokens_per_s": 250.0, "tokens_counted_by": "usage", "tpot_ms": {"mean": 20.0, "p50": 19.0},
        "ttft_ms": {"mean": 50.0, "p50": 40.0},
    }  # fmt: skip
    engine = {"model": "mixtral-8x7b", "parameters": MIXTRAL["parameters"], "device": "cuda:0", "dtype": "bfloat16"}
    return {"config": {"engine": engine | {"quantization": None}}, "result": result | changes, "commit": "a"}


def test_a_step_on_two_gpus_by_hand() -> None:
    needs = step_needs(step())
    assert needs.bytes == 32 * (LAYER + 2 * EXPERT) + OUTSIDE + EMBEDDED + KEPT * 96.5
    assert needs.bytes == 25_510_363_136, "worked out apart from this code"
    assert needs.devices == 2
    assert needs.seconds(Speed(4e12, 1e15)) == needs.bytes / 4e12 / 2


def test_more_rows_choose_more_experts_all_as_likely() -> None:
    params = {"batch": 2, "prompt_len": 1, "output_len": 1, "dtype": "bfloat16"}
    distinct = 2 + 2 * 6 / 8  # the second row's two are new with six chances of eight each
    expected = 32 * (LAYER + distinct * EXPERT) + OUTSIDE + 2 * EMBEDDED + 2 * KEPT * 2
    assert step_needs(step(params=params)).bytes == expected


def test_what_was_changed_in_the_model_counts() -> None:
    half = MIXTRAL | {"label": "mixtral-8x7b with 16 of 32 layers", "layers": 16, "parameters": 23_482_470_400}
    assert step_needs(step(model=half)).bytes == 16 * (LAYER + 2 * EXPERT) + OUTSIDE + EMBEDDED + KEPT / 2 * 96.5
    alone = recorded_model({"label": "tinymistral-6x248m", "experts": 1, "top_k": 2}).moe
    assert alone is not None
    assert (alone.num_experts, alone.top_k) == (1, 1)


def test_ranks_on_a_cpu_read_from_one_memory() -> None:
    assert step_needs(step(device={"kind": "cpu"})).devices == 1


@pytest.mark.parametrize("model", [MIXTRAL | {"name": "my-own"}, MIXTRAL | {"parameters": 46_702_792_705}, {}])
def test_a_model_that_is_not_the_one_named_has_no_floor(model: dict[str, Any]) -> None:
    with pytest.raises(NoFloorError, match=UNKNOWN_MODEL):
        step_needs(step(model=model))


def test_rows_that_hold_their_floor_hold_the_same() -> None:
    """Experts were counted in those, and memory's speed measured anew: hence the tolerance. Cards differ by 3.5%."""
    lines = (RESULTS / "h200_strategies.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "floor_ms" in row["result"]]
    assert {row["config"]["ranks"] for row in rows} == {1, 2, 4}
    for row in rows:
        least = 1e3 * step_needs(row).seconds(Speed(4529.94e9, 768e12))
        assert least == pytest.approx(row["result"]["floor_ms"], rel=0.035), row["model"]["label"]


def test_a_share_of_a_layer_by_hand() -> None:
    row = {"model": "mixtral-8x7b", "dtype": "bfloat16", "experts": 8, "slots": 4, "active_experts": 3}
    assert slice_needs(row | {"weight_bytes": 4 * EXPERT}).bytes == 2 * 8 * 4096 + 3 * EXPERT


def test_a_server_by_hand() -> None:
    needs = served_needs(served())
    assert needs.sequences == 5.0
    distinct = 8 * (1 - 0.75**5)
    context = 256 + (101 + 1) / 2
    expected = 32 * (LAYER + distinct * EXPERT) + OUTSIDE + 5 * EMBEDDED + 5 * KEPT * context
    assert needs.token.bytes == pytest.approx(expected, abs=2)
    # Of a prompt 200 tokens are computed, which choose every expert; two multiply-adds a weight, the head's once.
    assert needs.first.bytes == pytest.approx(32 * (LAYER + 8 * EXPERT) + OUTSIDE + EMBEDDED, abs=2)
    products = 200 * (46_702_792_704 - 2 * 32000 * 4096 - 32 * 6 * EXPERT // 2) + 32000 * 4096
    assert needs.first.flops == 2 * (products + 2 * 32 * (200 * 201 // 2) * 4096)


def test_the_first_token_waits_for_whichever_takes_longer() -> None:
    needs = served_needs(served()).first
    assert needs.seconds(Speed(1e12, 1e18)) == needs.bytes / 1e12
    assert needs.seconds(Speed(1e18, 1e12)) == needs.flops / 1e12


def test_rarely_is_there_less_than_one_sequence_and_then_one_decodes() -> None:
    assert served_needs(served(output_tokens_per_s=2.0)).sequences == 1.0
    assert served_needs(served(tpot_ms=None)).sequences == 1.0, "answers of one token"


def test_a_servers_gpus_read_together() -> None:
    row = served()
    row["config"]["engine"] |= {"tensor_parallel_size": 2, "data_parallel_size": 2, "expert_parallel_size": 2}
    assert (served_needs(row).token.devices, served_needs(row).first.devices) == (4, 4)


def test_what_a_row_of_a_server_says_of_its_floor() -> None:
    row, speed = served(), Speed(4e12, 8e14)
    needs = served_needs(row)
    found = served_floor(row, speed)
    assert found["floor_sequences"] == 5.0
    assert found["read_gb_s"] == 4000.0
    assert found["floor_ms"] == pytest.approx(needs.token.bytes / 4e9, rel=1e-4)
    assert found["percent_of_floor"] == pytest.approx(100 * needs.token.bytes / 4e9 / 20, rel=1e-3)
    assert found["percent_of_first_token_floor"] == pytest.approx(100 * needs.first.bytes / 4e9 / 50, rel=1e-3)
    assert "floor_ms" not in served_floor(served(tpot_ms=None), speed)


def test_why_a_server_has_no_floor() -> None:
    speed = Speed(4e12, 8e14)
    assert served_floor(served(), None) == {"floor_unknown": UNKNOWN_MACHINE}
    assert served_floor(served(prompt_tokens=None), speed) == {"floor_unknown": NOT_COUNTED}
    foreign = served() | {"config": {"engine": None}}
    assert served_floor(foreign, speed) == {"floor_unknown": UNKNOWN_MODEL}
    own = served()
    own["config"]["engine"]["model"] = "a-folder"
    assert served_floor(own, speed) == {"floor_unknown": UNKNOWN_MODEL}
    assert served_floor(own, speed, recorded_model(MIXTRAL)) == served_floor(served(), speed)


# ------------------------------------------------------------------ in a table


def test_what_is_computed_bears_a_star_and_knows_its_cells() -> None:
    shown = step_percent(Row("rows.jsonl", 7, step()), "result.step_ms.median")
    assert shown.text == "70*"
    assert shown.value is not None
    assert shown.value.number == pytest.approx(100 * 25_510_363_136 / 4529.94e9 / 2 / 4e-3)
    assert shown.value.cells == (
        Cell("rows.jsonl", 7, "result.step_ms.median"),
        Cell("h200x1", 0, "device.read_gb_s"),
    )
    assert shown.value.formula == "100 * 25510363136 / (2 * b * 1000000) / a"


def test_what_was_recorded_is_shown_as_it_is() -> None:
    recorded = step(result={"step_ms": {"median": 4.0}, "percent_of_floor": 61.2})
    assert step_percent(Row("rows.jsonl", 7, recorded), "result.step_ms.median").text == "61"
    why = step(result={"step_ms": {"median": 4.0}, "floor_unknown": "GPU not told"})
    assert step_percent(Row("rows.jsonl", 7, why), "result.step_ms.median").text == "GPU not told"


def test_a_cited_row_is_held_against_its_data_sheet_and_an_unknown_device_against_nothing() -> None:
    cited = step(device={"kind": "cuda", "name": "NVIDIA L4", "read_gb_s": 300}, config={})
    shown = step_percent(Row("rows.jsonl", 7, cited), "result.step_ms.median")
    assert shown.value is not None
    assert shown.value.cells[1] == Cell("rows.jsonl", 7, "device.read_gb_s")
    assert shown.value.number == pytest.approx(100 * 25_510_363_136 / 300e9 / 4e-3)
    other = step(device={"kind": "cuda", "name": "A GPU"})
    assert step_percent(Row("rows.jsonl", 7, other), "result.step_ms.median").text == UNKNOWN_MACHINE
    old = step(params={"batch": 1})
    assert step_percent(Row("rows.jsonl", 7, old), "result.step_ms.median").text == "not recorded"


def test_a_server_stands_on_the_machine_that_was_told() -> None:
    row = Row("rows.jsonl", 7, served())
    first, token = served_percents(row, {"a": "h200x1"})
    needs = served_needs(row.data)
    assert first.value is not None
    assert token.value is not None
    assert first.value.number == pytest.approx(100 * needs.first.bytes / 4529.94e9 / 50e-3)
    assert token.value.number == pytest.approx(100 * needs.token.bytes / 4529.94e9 / 20e-3)
    assert [shown.text for shown in served_percents(row, {})] == [UNKNOWN_MACHINE] * 2
    long = Row("rows.jsonl", 8, served(prompt_tokens=20_000, succeeded=5, cached_tokens=0))
    first, _ = served_percents(long, {"a": "h200x1"})
    assert first.value is not None
    assert first.value.cells[1].key == "device.tflops.bfloat16"
    assert first.value.number == pytest.approx(100 * served_needs(long.data).first.flops / 767.935e12 / 50e-3)
