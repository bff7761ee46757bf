"""`flexmoe plan` and `flexmoe simulate`: what they print, write and refuse. No torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from flexmoe.cli.main import main
from flexmoe.config.machine import DeviceSpec, Machine
from flexmoe.config.plan import ParallelPlan
from tests.unit.planning import machine


@pytest.fixture
def machine_file(tmp_path: Path) -> str:
    path = tmp_path / "machine.json"
    machine().save(path)
    return str(path)


def flexmoe(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def test_a_table_with_reasons_and_the_plan_s_file(machine_file: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    done = flexmoe("plan", "mixtral-8x7b", "--machine", machine_file, "--gpus", "4", "--explain", "--out", str(out))
    assert done.exit_code == 0, done.output
    assert "mixtral-8x7b on 4 x a GPU" in done.output
    assert "why it lost" in done.output
    legend = " ".join(done.output.split())
    assert "Why it lost: what it loses most by, in time for a token, all GPUs together." in legend
    assert " do not fit in memory" in legend
    assert " 0 of them not shown" not in legend
    assert "The best: " in done.output
    assert "one rank: rank 0 needs" in done.output
    assert ParallelPlan.read(out).num_ranks in (1, 2, 4)


def test_more_requests_than_any_plan_answers_are_told_of(machine_file: str) -> None:
    words = ("plan", "olmoe-1b-7b", "--machine", machine_file, "--gpus", "1")
    assert "No plan keeps up" not in flexmoe(*words, "--rate", "2").output
    done = " ".join(flexmoe(*words, "--rate", "5000").output.split())
    found = json.loads(flexmoe(*words, "--rate", "5000", "--json").stdout)
    most = max(plan["requests_per_s"] for plan in found["plans"] if "requests_per_s" in plan)
    assert f"No plan keeps up: {most:.3g} requests/s are answered at most, asked are 5e+03." in done


@pytest.mark.parametrize(("bfloat16", "taken"), [(0.02, "float32"), (1.5, "float32"), (1.7, "bfloat16")])
def test_on_a_cpu_numbers_are_fp32_where_that_is_clearly_faster(tmp_path: Path, bfloat16: float, taken: str) -> None:
    cpu = DeviceSpec("cpu", "a CPU", 64 << 30, 3e10, {"bfloat16": bfloat16 * 1e11, "float32": 2e11}, 3e-6, 5e-5)
    machine_file = tmp_path / "cpu.json"
    Machine("cpu", 1, 1, cpu, (), reserve_bytes=2**30).save(machine_file)
    words = ("plan", "olmoe-1b-7b", "--machine", str(machine_file), "--rate", "0.001")
    assert f"a CPU (cpu), {taken}\n" in flexmoe(*words).output
    assert "(cpu), bfloat16\n" in flexmoe(*words, "--dtype", "bfloat16").output
    assert "(cpu), int8, bfloat16\n" in flexmoe(*words, "--quantization", "int8").output  # no product is torch's


def test_where_no_plan_fits_the_number_format_is_named(tmp_path: Path) -> None:
    cpu = DeviceSpec("cpu", "a CPU", 20 << 30, 3e10, {"float32": 2e11, "bfloat16": 1e9}, 3e-6, 5e-5)
    machine_file = tmp_path / "cpu.json"
    Machine("cpu", 1, 1, cpu, (), reserve_bytes=2**30).save(machine_file)
    done = flexmoe("plan", "olmoe-1b-7b", "--machine", str(machine_file))
    assert done.exit_code == 1
    assert "(weights in float32 " in done.stderr


def test_json_holds_what_the_table_shows(machine_file: str) -> None:
    done = flexmoe("plan", "olmoe-1b-7b", "--machine", machine_file, "--gpus", "2", "--json", "--search-budget", "3")
    found = json.loads(done.stdout)
    assert found["skipped"] == 5
    assert len(found["plans"]) == 3
    best = found["plans"][0]
    assert best["reason"] == ""
    assert sum(best["terms_ms"].values()) == pytest.approx(best["tpot_ms"])
    assert ParallelPlan.from_json(best["plan"]).num_ranks * best["engines"] == 2


def test_a_workload_comes_from_a_file_and_options_go_before_it(machine_file: str, tmp_path: Path) -> None:
    file = tmp_path / "workload.json"
    file.write_text('{"input_len": 100, "output_len": 20, "rate": 2, "slo_tpot_ms": 40}', encoding="utf-8")
    words = ("plan", "olmoe-1b-7b", "--machine", machine_file, "--gpus", "1", "--workload", str(file))
    assert "2 requests/s of 100 + 20 tokens; most tokens a second within TPOT 40 ms" in flexmoe(*words).output
    assert "5 requests/s of 100 + 20 tokens" in flexmoe(*words, "--rate", "5").output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("mixtral-8x7b", "--machine", "none.json"), "Error: the machine 'none.json' is neither a file"),
        (("no/such/model", "--machine", "h200x8"), "Error: the folder no/such/model does not exist"),
        (
            ("mixtral-8x7b", "--machine", "h200x8", "--gpus", "64"),
            "64 devices of h200x8 are 8 nodes, but its links reach 8; use fewer, the machine h200x64, or a machine",
        ),
        (
            ("mixtral-8x7b", "--machine", "h100x8", "--gpus", "64"),
            "64 devices of h100x8 are 8 nodes, but its links reach 8; use fewer, or a machine file",
        ),
        (("builtin", "--machine", "cpu2", "--input-len", "900"), "900 + 128 tokens do not fit a context of 1024"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_line(words: tuple[str, ...], said: str) -> None:
    done = flexmoe("plan", *words)
    assert done.exit_code == 1
    assert said in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_a_broken_machine_file_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text('{"machine": "x"}', encoding="utf-8")
    done = flexmoe("plan", "mixtral-8x7b", "--machine", str(path))
    assert done.exit_code == 1
    assert f"Error: the machine file {path} is refused:" in done.output


def test_impossible_memory_is_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    machine(2, memory_gib=16).save(path)
    done = flexmoe("plan", "mixtral-8x7b", "--machine", str(path))
    assert done.exit_code == 1
    assert "no plan fits; the nearest is" in done.output
    assert "its device has 16.00 GiB" in done.output


def test_a_simulation_gives_a_row_for_each_rate(machine_file: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    done = flexmoe(
        "simulate", "olmoe-1b-7b", "--machine", machine_file, "--gpus", "1,2", "--rates", "2,8", "--duration", "20",
        "--out", str(rows),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert [row["gpus"] for row in found] == [1, 1, 2, 2]
    assert all(row["kind"] == "extrapolation" for row in found)
    assert found[1]["rate"] > found[0]["rate"]
    assert "requests simulated in" in done.output


def test_a_simulation_of_a_given_plan_beside_measured_rows(machine_file: str, tmp_path: Path) -> None:
    plan, measured = tmp_path / "plan.json", tmp_path / "measured.jsonl"
    ParallelPlan(2, 2).write(plan)
    times = {"mean": 5.0, "p50": 5.0, "p99": 6.0}
    result = {"ttft_ms": times, "tpot_ms": times, "output_tokens_per_s": 10.0, "requests_per_s": 1.0}
    measured.write_text(json.dumps({"params": {"rate": 1.0}, "result": result}) + "\n", encoding="utf-8")
    done = flexmoe(
        "simulate", "olmoe-1b-7b", "--machine", machine_file, "--plan", str(plan), "--gpus", "4", "--rate", "2",
        "--num-requests", "30", "--measured", str(measured), "--measured-gpus", "2", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    first, second = json.loads(done.stdout)
    assert (first["kind"], first["gpus"]) == ("measured", 2)
    assert (second["plan"], second["requests"]) == ("2 engines x tensor 2, experts over 2", 30)
