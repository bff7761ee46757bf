"""Which rows poster and report show, and what they say of each number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flexmoe.errors import ConfigError
from flexmoe.report.charts import cpu, experts, figures, latency, operations, profiled, throughput
from flexmoe.report.charts import served as served_figure
from flexmoe.report.headlines import headlines
from flexmoe.report.prompts import prompt_operations
from flexmoe.report.rows import CITED, Cell, Row, cell_number, newest, read_rows
from flexmoe.report.serving import served as served_table
from flexmoe.report.strategies import spread as spread_figure
from flexmoe.report.strategies import strategies
from flexmoe.report.table import markdown, three
from flexmoe.report.tables import cpu as cpu_table
from flexmoe.report.tables import first_tokens, latency_elsewhere, llama_cpp, slices, spread
from flexmoe.report.tables import latency as latency_table
from flexmoe.report.tables import throughput as throughput_table

CPU = {"kind": "cpu", "name": "A Processor"}


def row(line: int, *, batch: int = 1, ms: float = 2.0, engine: str = "flexmoe", **more: Any) -> Row:
    result = {"ms": ms, "floor_ms": 1.0, "percent_of_floor": 100 / ms, "distinct_experts": 2.0}
    data = {
        "benchmark": "latency",
        "engine": engine,
        "model": {"name": "builtin", "label": "builtin", "parameters": 10, "experts": 8, "top_k": 2},
        "params": {"batch": batch, "prompt_len": 64, "dtype": "float32"},
        "result": result,
        "time": "2026-11-20T00:00:00+00:00",
        "device": CPU,
    }
    return Row("rows.jsonl", line, data | more)


def test_a_newer_row_replaces_an_older_one_whatever_their_order() -> None:
    rows = [row(1, ms=2.0, time="2026-11-22"), row(2, ms=9.0, time="2026-11-21"), row(3, batch=8, ms=4.0)]
    figure = latency(rows)
    assert figure is not None
    floor, ours = figure.panels[0].series
    assert [(point.x, point.value.number, point.value.cells[0].line) for point in ours.points] == [
        ("1", 2.0, 1),
        ("8", 4.0, 3),
    ]
    assert {point.value.cells[0].key for point in floor.points} == {"result.floor_ms"}


def test_rows_of_a_changed_model_an_error_or_another_prompt_length_stay_out() -> None:
    other = row(3).data["model"] | {"label": "builtin with 4 experts"}
    long = {"batch": 8, "prompt_len": 4096}
    rows = [row(1), row(2, batch=8), row(3, model=other), row(4, result={"error": "no"}), row(5, params=long)]
    figure = latency(rows)
    assert figure is not None
    assert len(figure.panels) == 1
    assert [point.value.cells[0].line for point in figure.panels[0].series[1].points] == [1, 2]


def test_steps_on_other_gpus_have_a_table_of_their_own() -> None:
    big, small = {"kind": "cuda", "name": "A GPU"}, {"kind": "cuda", "name": "B GPU"}
    part = row(0).data["model"] | {"label": "builtin with 2 of 4 layers", "parameters": 5}
    rows = [
        *(row(1, device=big, batch=batch) for batch in (1, 2, 4, 8)), row(3, device=small, ms=4.0, time="2026-11-19"),
        row(4, device=small, ms=5.0), row(5, device=small, batch=8, model=part, ms=8.0), row(6, ms=9.0),
        row(7, device=small, engine="hf-best"),
    ]  # fmt: skip
    table = latency_elsewhere(rows)
    assert table is not None
    shown = [[cell.text for cell in line] for line in table.rows]
    assert shown == [
        ["B GPU", "builtin", "1", "5.00", "1.00", "20", "2.0"],
        ["B GPU", "builtin with 2 of 4 layers", "8", "8.00", "1.00", "12", "2.0"],
    ]
    assert latency_elsewhere(rows[:2]) is None


def test_experts_are_compared_at_the_lengths_measured_last() -> None:
    def course(line: int, count: int, length: int, day: int) -> Row:
        model = {
            "name": "tinymistral-6x248m", "label": "tinymistral-6x248m", "layers": 12, "experts": count, "top_k": 2,
            "parameters": 10,
        }  # fmt: skip
        params = {"batch": 1, "prompt_len": length, "output_len": 128, "dtype": "bfloat16"}
        return row(line, model=model, params=params, time=f"2026-11-{day}", device={"kind": "cuda", "name": "A GPU"})

    figure = experts([course(1, 2, 13, 22), course(2, 4, 13, 22), course(3, 2, 64, 20), course(4, 16, 64, 20)])
    assert figure is not None
    assert [point.x for point in figure.panels[-1].series[0].points] == ["2", "4"]


def test_servers_under_load_have_a_table_of_all_loads_and_a_picture_of_streams() -> None:
    def load(line: int, streams: int | None, rate: float, **more: Any) -> Row:
        params = {"concurrency": streams, "input_len": [64, 64], "output_len": [8, 16]}
        params |= {"trace": None if streams else "/some/where/trace.csv", "duration": None if streams else 28.0}
        params |= {"seed": line, "time_scale": 1.0 if streams else 0.4}
        times = {"p50": 2.0, "p99": 9.0}
        result = {"output_tokens_per_s": rate, "ttft_ms": times, "tpot_ms": times, "itl_ms": times}
        about = {"config": {"engine": {"device": "cuda:0"}}, "params": params, "result": result}
        return row(line, benchmark="serve", **about | more)

    rows = [load(1, 4, 50.0, time="2026-11-19"), load(2, 4, 60.0), load(3, None, 7.0, note="a new server")]
    table = served_table(rows)
    assert table is not None
    assert [[cell.text for cell in line[2:5]] for line in table.rows] == [
        ["cuda:0", "4 streams of 64 + 8-16 tokens", "60.0"],
        ["cuda:0", "trace, 28 s, 2.5 times as fast; a new server", "7.00"],
    ]
    assert served_table([row(1)]) is None
    assert served_figure(rows[2:]) is None
    figure = served_figure([*rows, load(4, 16, 90.0)])
    assert figure is not None
    assert [point.value.number for point in figure.panels[0].series[0].points] == [60.0, 90.0]


def test_strategies_on_gpus_stand_beside_one_gpu_of_the_same_run() -> None:
    def step(line: int, ranks: int, ms: float, commit: str, **config: Any) -> Row:
        result = {"step_ms": {"median": ms}, "imbalance": {"step": 1.5}}
        about = {"ranks": ranks, "strategy": "tensor" if ranks > 1 else "one process"} | config
        device = {"kind": "cuda", "name": "A GPU"}
        return row(line, benchmark="strategies", device=device, config=about, result=result, commit=commit)

    by_nccl = {"decode_kernels": "Triton, sums over ranks by all-reduce: the ranks are on several machines"}
    by_launch = {"decode_kernels": "Triton, sums over ranks by one launch"}
    rows = [
        step(1, 1, 4.0, "a"),
        step(2, 1, 5.0, "b"),
        step(3, 2, 3.0, "a", **by_launch),
        step(4, 4, 2.0, "b", **by_nccl),
    ]
    table = spread([*rows, step(5, 8, 1.0, "c")])
    assert table is not None
    assert [[shown.text for shown in line[2:]] for line in table.rows] == [
        ["2", "tensor", "3.00", "unknown model", "4.00", "0.75", "1.50", "one launch"],
        ["4", "tensor", "2.00", "unknown model", "5.00", "0.40", "1.50", "all-reduce"],
    ]
    assert spread([row(1)]) is None
    figure = spread_figure([*rows, step(6, 4, 2.5, "b", strategy="expert, all-reduce", **by_nccl)])
    assert figure is not None
    (panel,) = figure.panels
    shown = [(one.key, point.value.number, point.note.number) for one in panel.series for point in one.points]  # type: ignore[union-attr]
    assert shown == [("tensor", 0.4, 2.0), ("expert, all-reduce", 0.5, 2.5)], "the most GPUs alone"
    assert panel.series[0].points[0].value.cells[1] == Cell("rows.jsonl", 2, "result.step_ms.median")
    assert spread_figure([row(1)]) is None


def test_shares_of_a_layer_stand_beside_the_whole() -> None:
    def share(line: int, strategy: str, degree: int, us: float, **fields: Any) -> Row:
        about = {"strategy": strategy, "degree": degree, "block": {"median": us}, "weight_bytes": 800_000_000 // degree}
        about |= {"benchmark": "slices", "model": "mixtral-8x7b", "batch": 8, "device": {"name": "NVIDIA H200"}}
        about |= {"dtype": "bfloat16", "experts": 8, "slots": 2, "active_experts": 1, "result": {}}
        return Row("rows.jsonl", line, row(line).data | about | fields)

    # Half of the experts' bytes at 4,529.94 GB/s are 88.3, 44.2 and 11.0 us; the router's 65,536 hardly count.
    rows = [
        share(1, "tensor", 1, 400.0),
        share(2, "tensor", 2, 250.0),
        share(3, "expert", 2, 300.0),
        share(4, "expert", 8, 100.0),
        share(5, "expert", 8, 0.0, batch=32, block={"error": "no"}),
        share(6, "tensor", 1, 500.0, batch=32),
    ]
    table = slices(rows)
    assert table is not None
    assert table.header[2:] == (
        "one rank, µs", "tensor 2, µs", "expert 2, µs", "expert 8, µs", "tensor 2 / one", "expert 8 / one",
        "one rank, % of floor", "tensor 2, % of floor", "expert 8, % of floor",
    )  # fmt: skip
    assert [[shown.text for shown in line] for line in table.rows] == [
        ["Mixtral-8x7B", "8", "400", "250", "300", "100", "0.62", "0.25", "22", "18", "11"],
        ["Mixtral-8x7B", "32", "500", "", "", "", "", "", "18", "", ""],
    ]
    assert table.rows[0][7].value.cells[0] == Cell("rows.jsonl", 4, "block.median")  # type: ignore[union-attr]
    assert slices([row(1)]) is None is slices([share(1, "expert", 2, 3.0)])


def test_prompts_and_many_requests_stand_beside_vllm_and_a_goal() -> None:
    def many(line: int, rate: float, **fields: Any) -> Row:
        params = {"requests": 512, "prompt_len": 512, "output_len": 128}
        result = {"output_tokens_per_s": rate, "percent_of_floor": 40.0, "device_busy_percent": 99.0}
        return row(line, **({"benchmark": "throughput", "params": params, "result": result} | fields))

    rows = [
        many(1, 900.0),
        many(2, 1500.0, config={"one_pass": True}),
        many(3, 600.0, engine="vllm", cited=True),
        many(4, 1000.0, benchmark="throughput_target", cited=True),
    ]
    table, figure = throughput_table(rows), throughput(rows)
    assert table is not None
    assert [[shown.text for shown in line[2:]] for line in table.rows] == [["900", "40", "99", "600", "1.50×", "1,000"]]
    assert figure is not None
    assert [point.value.number for point in figure.panels[0].series[0].points] == [900.0, 600.0]

    def first(line: int, ms: float, **fields: Any) -> Row:
        device, params = {"kind": "cuda", "name": "A GPU"}, {"batch": 1, "prompt_len": 2048}
        return row(line, **({"params": params, "result": {"first_token_ms": ms}, "device": device} | fields))

    prompts = [first(1, 12.0), first(2, 18.0, benchmark="first_token", engine="vllm", cited=True)]
    for goal, missed in ((10.0, "10.0"), (12.0, ""), (13.0, "")):
        table = first_tokens([*prompts, first(3, goal, benchmark="first_token_target", cited=True)])
        assert table is not None
        assert [shown.text for shown in table.rows[0][1:]] == ["2,048", "12.0", "not recorded", "18.0", "1.50×", missed]
    assert throughput_table([row(1)]) is first_tokens([row(1)]) is throughput([row(1)]) is None


def test_operations_of_a_prompt_stand_beside_their_floor_longest_first() -> None:
    def prompt(line: int, tokens: int, model: str, **us: float) -> Row:
        made = {"floor_us": 10.0, "tflop_s": 600.0, "product": 75.0, "read": 20.0}
        operations = {name: made | {"us": took} for name, took in us.items()}
        operations["norm"] |= {"tflop_s": 0.0, "product": 0.0}
        about = {"benchmark": "prefill", "model": model, "params": {"tokens": tokens, "layers": 4}}
        return row(line, **about, device={"name": "A GPU"}, result={"operations": operations})

    rows = [
        prompt(1, 2048, "olmoe-1b-7b", down=30.0, norm=5.0, other=1.0),
        prompt(2, 512, "mixtral-8x7b", down=7.0, norm=9.0),
        prompt(3, 2048, "olmoe-1b-7b", down=20.0, norm=40.0, other=1.0),
        prompt(4, 2048, "mixtral-8x7b", down=16.0, norm=12.0),
    ]
    table = prompt_operations(rows)
    assert table is not None
    assert [[shown.text for shown in line[1:]] for line in table.rows] == [
        ["experts, down", "16.0", "10.0", "62%", "600", "75", "20"],
        ["sums and norms", "12.0", "10.0", "83%", "", "", "20"],
        ["sums and norms", "40.0", "10.0", "25%", "", "", "20"],
        ["experts, down", "20.0", "10.0", "50%", "600", "75", "20"],
    ]
    assert prompt_operations([row(1)]) is None


def test_cited_rows_of_another_device_are_not_set_beside_ours() -> None:
    cited = row(2, engine="vllm", ms=1.5, cited=True, device={"kind": "cuda", "name": "NVIDIA H200"})
    near = row(3, engine="vllm", ms=3.0, cited=True)
    assert [one.key for one in latency([row(1), cited]).panels[0].series] == ["floor", "flexmoe"]  # type: ignore[union-attr]
    big = headlines([row(1), near])
    assert [one.big for one in big] == ["50%", "1.50×"]
    assert big[1].values[0].cells == (Cell("rows.jsonl", 3, "result.ms"), Cell("rows.jsonl", 1, "result.ms"))


def test_without_rows_there_is_no_figure() -> None:
    assert figures([]) == []
    assert [make([row(1)]) for make in (experts, cpu, strategies, operations)] == [None] * 4
    assert figures(read_rows([CITED])) == []


def test_the_table_tells_a_goal_that_was_missed_and_no_other() -> None:
    goals = [row(n, batch=b, ms=ms, benchmark="target", cited=True) for n, b, ms in ((3, 1, 1.9), (4, 8, 4.0))]
    table = latency_table([row(1), row(2, batch=8, ms=4.0), *goals])
    assert table is not None
    assert [line[-1].text for line in table.rows] == ["1.90", ""]
    assert "| builtin | 1 | 2.00 | 1.00 | 50 | 2.0 |  |  |  | 1.90 |" in markdown(table)


def test_operations_of_a_profile_are_piled_and_known_by_their_place() -> None:
    found = [{"operation": "experts", "us": 7.0}, {"operation": "host gaps", "us": 2.0}]
    figure = profiled([row(4, benchmark="profile", result={"operations": found})])
    assert figure is not None
    assert [one.label for one in figure.panels[0].series] == ["experts", "host gaps"]
    (point,) = figure.panels[0].series[1].points
    assert (point.x, point.value.number) == ("batch 1", 2.0)
    assert point.value.cells == (Cell("rows.jsonl", 4, "result.operations.1.us"),)


@pytest.mark.parametrize(("number", "text"), [(0.86, "0.860"), (6.066, "6.07"), (24.56, "24.6"), (182255.1, "182,255")])
def test_three_figures_are_shown(number: float, text: str) -> None:
    assert three(number) == text


def test_values_know_their_cells_and_can_be_read_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + json.dumps(row(2).data) + "\n")
    (read,) = read_rows([file], root=tmp_path)
    value = read.value("result.ms")
    assert value.cells == (Cell("rows.jsonl", 2, "result.ms"),)
    assert cell_number(value.cells[0], tmp_path) == 2.0
    assert value.over(read.value("result.floor_ms")).formula == "a / b"


def test_files_that_are_no_rows_are_refused_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n[1]\n")
    with pytest.raises(ConfigError, match=r"rows.jsonl:2 is no JSON object"):
        read_rows([file])
    file.write_text("{}\n{\n")
    with pytest.raises(ConfigError, match=r"rows.jsonl:2 is no JSON;"):
        read_rows([file])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rows([tmp_path / "none.jsonl"])


def test_newest_keeps_the_order_of_first_appearance() -> None:
    rows = [row(1, batch=8), row(2), row(3, batch=8, time="2027")]
    assert [kept.line for kept in newest(rows, ("params.batch",))] == [3, 2]


def comparison(line: int, engine: str, dtype: str, median: float, **more: Any) -> Row:
    """A row of the comparisons on a CPU, newer by its line."""
    data = {
        "benchmark": "cpu_compare_llama_cpp",
        "phase": "final",
        "metric": "decode_bs1",
        "engine": engine,
        "config": {"dtype": dtype},
        "model": {"name": "60M"},
        "unit": "ms",
        "median": median,
        "percent_of_floor": 50.0,
        "time": f"2026-11-{20 + line}T00:00:00+00:00",
        "device": {"cpu": "A Processor", "cores": 2},
    }
    return Row("rows.jsonl", line, data | more)


def test_beside_llama_cpp_at_equal_precision() -> None:
    rate = {"metric": "throughput_32", "unit": "tokens/s"}
    table = llama_cpp(
        [
            comparison(0, "flexmoe", "bfloat16", 9.0),
            comparison(1, "flexmoe", "bfloat16", 2.0),
            comparison(1, "flexmoe", "int8", 1.0),
            comparison(1, "llama.cpp", "bf16", 3.0, percent_of_floor=None),
            comparison(1, "llama.cpp", "q8_0", 1.5, about={"llama-cpp-python": "0.3"}),
            comparison(1, "transformers", "bfloat16", 2.5),
            comparison(1, "flexmoe", "bfloat16", 300.0, **rate),
            comparison(1, "llama.cpp", "bf16", 200.0, **rate),
            comparison(2, "llama.cpp", "bf16", 0.1, quick=True),
        ]
    )
    assert table is not None
    assert [[shown.text for shown in line[2:]] for line in table.rows] == [
        ["bf16", "2.00", "50", "3.00", "not recorded", "2.50", "1.25×"],
        ["8 bits", "1.00", "50", "1.50", "50", "", "1.50×"],
        ["bf16", "300", "50", "200", "50", "", "1.50×"],
    ]
    assert "2 cores; medians" in table.about
    assert "llama-cpp-python 0.3; A;" in table.about
    assert llama_cpp([comparison(1, "llama.cpp", "bf16", 3.0)]) is None


@pytest.mark.parametrize(("percent", "shown"), [(61.4, "61"), (None, "not recorded")])
def test_beside_transformers_with_the_floor_of_that_run(percent: float | None, shown: str) -> None:
    facts = {"benchmark": "cpu_compare_hf", "percent_of_floor": percent}
    table = cpu_table(
        [comparison(1, "flexmoe", "auto", 1.0, **facts), comparison(1, "transformers", "bf16", 3.0, **facts)]
    )
    assert table is not None
    assert [line[-1].text for line in table.rows] == [shown]
