"""`flexmoe bench machine` on this CPU: what it times exists and adds up, in bounded time, and its file is read back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode

from flexmoe.bench import machine_cpu, machine_jobs, native_operations, torch_operations
from flexmoe.bench.machine_jobs import Lazy, run_jobs
from flexmoe.bench.machine_ranks import slowest
from flexmoe.bench.machine_samples import (
    gpu_prompt_samples,
    native_samples,
    prompt_samples,
    step_samples,
    torch_decode_samples,
)
from flexmoe.bench.machine_shapes import builtin_shape, cpu_shapes, cpu_slices, gpu_shapes, gpu_slices
from flexmoe.bench.native_operations import NativeLayers
from flexmoe.bench.prompt_operations import named, split
from flexmoe.bench.torch_operations import TorchLayers
from flexmoe.cli.main import main
from flexmoe.config.machine import Machine, Sample
from flexmoe.config.plan import ParallelPlan
from flexmoe.models.presets import PRESETS
from flexmoe.planner.cost_model import CostModel, StepShape
from flexmoe.planner.operations import Operation

BUILTIN = builtin_shape().config
CPU = torch.device("cpu")


def known(samples: list[Sample]) -> list[Sample]:
    """All of them, which the planner can price."""
    for sample in samples:
        assert Operation(sample.op.partition(".")[2], sample.rows, sample.shape).work.flops > 0
        assert sample.seconds > 0
    return samples


def test_what_was_measured_twice_counts_as_the_quicker_time() -> None:
    def sample(seconds: float, rows: int = 4, op: str = "fused.head") -> Sample:
        return Sample(op, "float32", rows, (8192, 512), seconds)

    slow, quick, other = sample(3.0), sample(1.0), sample(2.0, rows=8)
    assert machine_cpu.merged([slow, other, quick, sample(2.0)]) == [quick, other]
    differences = [sample(seconds, op="fused.attention") for seconds in (1.0, 2.0)]
    assert machine_cpu.merged(differences) == [sample(1.5, op="fused.attention")]


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call takes a microsecond for each operation of torch. Timed, a part can take longer than the whole."""

    def timed(call: Callable[[int], Any], layer: int) -> float:
        with Operations() as operations:
            call(layer)
        return 1e-6 * operations.count

    monkeypatch.setattr(torch_operations, "_timed", timed)


@pytest.mark.usefixtures("_counted")
def test_operations_of_a_prompt_add_up_to_the_layer() -> None:
    layers = TorchLayers(BUILTIN, torch.float32, CPU)
    took = layers.prompt(32)
    assert set(took) == {"qkv", "out", "prompt", "experts", "router"}
    assert sum(took.values()) > took["experts"] > 0
    assert {s.op for s in known(prompt_samples(layers, 32))} >= {"torch.linear", "torch.experts"}
    assert known(torch_decode_samples(layers, 4, 64, ranks=2))[0].ranks == 2


def test_of_ranks_the_slowest_counts_and_what_one_lost_is_left_out() -> None:
    """As happens on a busy machine: the second rank's router took less than can be told from noise."""
    linear, router = (
        Sample("torch.linear", "float32", 1, (8, 8), 1e-5, 2),
        Sample("torch.router", "float32", 1, (4, 8, 2), 1e-6, 2),
    )
    slower = replace(linear, seconds=3e-5)
    assert slowest([[linear, linear, router], [linear, slower]]) == [slower]
    assert slowest([[router, linear], [slower, router]]) == [router, slower]


@pytest.mark.usefixtures("_counted")
def test_a_prompt_behind_others_sees_them() -> None:
    layers = TorchLayers(BUILTIN, torch.float32, CPU)
    shape = next(s.shape for s in prompt_samples(layers, 64, 512) if s.op == "torch.prompt")
    a = BUILTIN.attention
    assert shape == (512, a.num_heads, a.num_kv_heads, a.head_dim, 0)


def test_parts_of_a_step_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_operations, "time", SimpleNamespace(perf_counter=time.thread_time))  # of ours alone
    layers = NativeLayers(BUILTIN, torch.float32, 1)
    samples = known(native_samples(layers, 4, 64))
    linears = [sample for sample in samples if sample.op == "fused.linear"]
    a = BUILTIN.attention
    assert [s.shape for s in linears] == [
        (BUILTIN.qkv_size, BUILTIN.hidden_size), (BUILTIN.hidden_size, a.num_heads * a.head_dim),
    ]  # fmt: skip
    (head,) = [sample for sample in samples if sample.op == "fused.head"]
    assert head.shape == (BUILTIN.vocab_size, BUILTIN.hidden_size)
    assert layers.whole(4, 64) > max(sample.seconds for sample in samples)


def test_operations_of_a_step_on_a_gpu_by_name() -> None:
    config = PRESETS["olmoe-1b-7b"].config
    added = {"rest": 1.0, "qkv": 2e-6, "decode_attention": 3e-6, "route": 4e-6, "topk": 1e-6, "combine": -1e-6,
             "expert_gate_up_grouped": 5e-6, "expert_down_grouped": 6e-6}  # fmt: skip
    found = {sample.op: sample for sample in step_samples(config, added, 8, 256)}
    assert found["fused.router"].seconds == pytest.approx(5e-6)
    assert found["fused.experts"].seconds == pytest.approx(10e-6)
    assert found["fused.experts"].shape == (42.01, 2048, 1024)
    assert found["fused.experts"].rows == 64
    assert found["fused.attention"].shape[0] == 256


def test_operations_of_a_prompt_on_a_gpu_by_their_kernels() -> None:
    """Two layers as a profiler lists them: products of torch are known by what comes before them."""
    layer = [
        ("nvjet_qkv", 3.0), ("_rotate_and_store", 1.0), ("_prefill_attention", 5.0), ("nvjet_out", 2.0),
        ("_combine_norm", 0.5), ("_route_many", 0.3), ("_topk", 0.1), ("_group_by_expert", 0.1),
        ("_gate_up_grouped", 20.0), ("_down_grouped", 10.0), ("_combine_norm", 0.5),
    ]  # fmt: skip
    operations = named([("_fetch", 0.2), ("_begin_rows", 0.2), *layer, *layer, ("nvjet_head", 4.0)])
    assert {name: operations[name] for name in ("qkv", "output", "attention", "gate_up", "head", "norm")} == {
        "qkv": 6.0, "output": 4.0, "attention": 10.0, "gate_up": 40.0, "head": 4.0, "norm": 2.2,
    }  # fmt: skip
    took = split(94.0, 0.8, operations, 2)
    assert took == {"qkv": 3, "output": 2, "attention": 5, "experts": 30, "router": 5, "head": 4, "host": 0.4}
    config = PRESETS["olmoe-1b-7b"].config
    found = {(s.op, s.shape[0]): s for s in known(gpu_prompt_samples(config, took, 512, 4096))}
    assert found["prompts.linear", 6144].seconds == 3
    assert (found["prompts.linear", 50304].rows, found["prompts.linear", 50304].seconds) == (1, 4)
    assert found["prompts.prompt", 4096].rows == 512
    assert (found["prompts.experts", 64].rows, found["prompts.experts", 64].seconds) == (4096, 30)
    assert found["prompts.router", 64].seconds == 5


def test_shapes_can_be_made() -> None:
    for shape in [*gpu_shapes(), *gpu_slices(), *cpu_shapes(), *cpu_slices(2), *cpu_slices(4)]:
        moe = shape.config.moe
        assert moe is not None, shape.name
        assert 0 < moe.top_k <= moe.num_experts, shape.name
        assert all(layer.is_moe for layer in shape.config.layers), shape.name


def test_jobs_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    sample = Sample("torch.linear", "float32", 1, (1, 1), 1.0)
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(machine_jobs, "time", clock)

    def slow() -> list[Sample]:
        clock.now += 0.06
        return [sample]

    assert run_jobs([("a", slow), ("b", slow), ("c", slow)], 0.05, said.append) == [sample]
    assert said == ["a", "no time is left for b and what comes after it"]


def test_a_job_that_fails_is_told() -> None:
    said: list[str] = []
    sample = Sample("torch.linear", "float32", 1, (1, 1), 1.0)

    def failing() -> list[Sample]:
        raise RuntimeError("no such shape\nand more")

    assert run_jobs([("a", failing), ("b", lambda: [sample])], 1, said.append) == [sample]
    assert said == ["a", "a failed: RuntimeError: no such shape", "b"]


def test_models_are_made_once() -> None:
    made: list[int] = []
    lazy = Lazy(lambda: made.append(1) or len(made))
    assert (lazy(), lazy(), made) == (1, 1, [1])


@pytest.mark.usefixtures("few_rounds")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_cpu, "read_bandwidth", lambda _: 1e10)  # it takes a second, and half a gigabyte
    out = tmp_path / "here.json"
    done = CliRunner().invoke(
        main, ["bench", "machine", "--device", "cpu", "--name", "here", "--seconds", "1", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    machine = Machine.load(out)
    assert machine.name == "here"
    assert machine.is_shared
    assert "exchanges among ranks" in machine.extrapolated
    assert machine.samples
    assert machine.serving is not None
    assert [count for count, _ in machine.serving.streams] == [1, 4]
    assert 0 < CostModel(machine, BUILTIN, ParallelPlan(), dtype="float32").step(StepShape(1, 64)).seconds < 10
