"""Device, threads and dtype: what is chosen, what is refused and with which words; the dtype never narrows weights."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flexmoe import LLM
from flexmoe.engine import device as module
from flexmoe.engine.device import choose_device, choose_dtype, physical_cores, set_threads
from flexmoe.errors import ConfigError
from tests.cpu.tiny_decoders import config

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALF, FULL, FP16 = torch.bfloat16, torch.float32, torch.float16


def pretend_gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def refusal(name: str) -> str:
    with pytest.raises(ConfigError) as error:
        choose_device(name)
    return str(error.value)


def test_devices_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(0, monkeypatch)
    assert choose_device("auto") == choose_device("cpu") == CPU
    assert refusal("cuda") == f"device='cuda', but torch {torch.__version__} sees no GPU here; use cpu."
    assert "sees no GPU" in refusal("cuda:1")


def test_devices_with_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(2, monkeypatch)
    assert choose_device("auto") == choose_device("cuda") == GPU
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu") == CPU
    assert refusal("cuda:2") == "device='cuda:2', but there are 2 GPUs; use a lower index."


@pytest.mark.parametrize("name", ["", "gpu", "cuda:x", "cuda:-1", "CUDA", "5"])
def test_what_is_no_device(name: str) -> None:
    assert refusal(name) == f"device={name!r} is not a device; use auto, cpu, cuda or cuda:N."


@pytest.mark.parametrize("name", ["mps", "xpu:0", "meta"])
def test_devices_that_are_not_served(name: str) -> None:
    assert refusal(name) == f"device={name!r} is not supported; use auto, cpu, cuda or cuda:N."


def topology(monkeypatch: pytest.MonkeyPatch, cores: dict[int, str], root: Path) -> None:
    """The processors that the process may use, each with its core."""
    monkeypatch.setattr(module, "_usable_processors", lambda: set(cores))
    monkeypatch.setattr(module, "_siblings", lambda cpu: cores[cpu])
    monkeypatch.setattr(module, "_CGROUP", root)


def test_a_core_counts_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    topology(monkeypatch, {0: "0,4", 4: "0,4", 1: "1,5", 6: "2,6"}, tmp_path)
    assert physical_cores() == 3


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ({"cpu.max": "max 100000\n"}, 4),
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "350000 100000\n"}, 3),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "900000 100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "300000\n"}, 4),
    ],
)
def test_no_more_threads_than_a_container_gets_time_for(
    files: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    topology(monkeypatch, {cpu: str(cpu) for cpu in range(4)}, tmp_path)
    (tmp_path / "cpu").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert physical_cores() == count


def test_a_machine_that_tells_nothing_of_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module._siblings(10**6) == "1000000"
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert physical_cores() == 1


def test_here() -> None:
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


def test_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    topology(monkeypatch, {0: "0,1", 1: "0,1", 2: "2,3", 3: "2,3"}, tmp_path)
    assert (set_threads(None), torch.get_num_threads()) == (2, 2)
    assert (set_threads(4), torch.get_num_threads()) == (4, 4)
    assert (set_threads(1), torch.get_num_threads()) == (1, 1)
    with pytest.raises(ConfigError, match="threads=5 is above the 4 processors that this process may use"):
        set_threads(5)
    assert torch.get_num_threads() == 1


class Probes:
    """Stands in for the measurement: seconds by dtype. asked: what was measured, and with how many rows."""

    def __init__(self, own: float, wide: float) -> None:
        self.seconds = {FULL: wide, HALF: own, FP16: own}
        self.asked: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def __call__(self, config: object, dtype: torch.dtype, rows: tuple[int, ...]) -> float:
        self.asked.append((dtype, tuple(rows)))
        return self.seconds[dtype]


def choose(
    monkeypatch: pytest.MonkeyPatch, probes: Probes, checkpoint: str, name: str = "auto", device: torch.device = CPU,
    few_rows_in_c: bool = False,
) -> torch.dtype:  # fmt: skip
    monkeypatch.setattr(module, "_probe", probes)
    return choose_dtype(name, config(checkpoint_dtype=checkpoint), device, few_rows_in_c=few_rows_in_c)


@pytest.mark.parametrize(
    ("own", "wide", "widens"), [(1.0, 2.0, False), (1.0, 1.0, False), (1.0, 0.9, False), (1.0, 0.5, True)]
)
@pytest.mark.parametrize("checkpoint", ["bfloat16", "float16"])
def test_16_bits_become_fp32_only_where_that_is_clearly_faster(
    own: float, wide: float, widens: bool, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = choose(monkeypatch, Probes(own, wide), checkpoint)
    assert chosen is (FULL if widens else getattr(torch, checkpoint))


@pytest.mark.parametrize("device", [CPU, GPU])
def test_fp32_is_never_narrowed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = Probes(own=1e-9, wide=1.0)
    assert choose(monkeypatch, probes, "float32", device=device) is FULL
    assert probes.asked == []


def test_on_a_gpu_the_checkpoint_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    probes = Probes(own=1.0, wide=1e-9)
    assert choose(monkeypatch, probes, "bfloat16", device=GPU) is HALF
    assert choose(monkeypatch, probes, "float16", device=GPU) is FP16
    assert probes.asked == []


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_named_dtype_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = Probes(1.0, 1.0)
    for checkpoint in ("float32", "bfloat16"):
        assert choose(monkeypatch, probes, checkpoint, name) is getattr(torch, name)
    assert probes.asked == []


def test_fp16_is_widened_for_the_c_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They know no fp16, and through torch alone it would decode more slowly than they do in fp32."""
    probes = Probes(1.0, 1.0)
    assert choose(monkeypatch, probes, "float16", few_rows_in_c=True) is FULL
    assert probes.asked == []


@pytest.mark.parametrize(
    ("checkpoint", "in_c", "rows"),
    [("bfloat16", True, (64,)), ("bfloat16", False, (1, 64)), ("float16", False, (1, 64))],
)
def test_only_what_torch_will_compute_is_measured(
    checkpoint: str, in_c: bool, rows: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = Probes(1.0, 1.0)
    choose(monkeypatch, probes, checkpoint, few_rows_in_c=in_c)
    assert probes.asked == [(getattr(torch, checkpoint), rows), (FULL, rows)]


def test_where_all_rows_go_through_c_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine must not change the number format, and with it the answers, from one start to the next."""
    probes = Probes(own=1.0, wide=1e-9)
    monkeypatch.setattr(module, "_probe", probes)
    for checkpoint, chosen in (("bfloat16", HALF), ("float16", FULL), ("float32", FULL)):
        own = config(checkpoint_dtype=checkpoint)
        assert choose_dtype("auto", own, CPU, few_rows_in_c=True, prompts_in_c=True) is chosen
    assert probes.asked == []


@pytest.mark.parametrize("checkpoint", ["bfloat16", "float16"])
def test_a_real_measurement(checkpoint: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        own = replace(config(), checkpoint_dtype=checkpoint, hidden_size=512)
        chosen = choose_dtype("auto", own, CPU, few_rows_in_c=False)
    assert chosen in (FULL, getattr(torch, checkpoint))
    assert f"using {chosen}" in caplog.text
    assert 0 < module._probe(own, chosen, (1, 64)) < 1


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("dtype", "lines"), [("float16", 1), ("float32", 0), ("auto", 0)])
def test_fp16_on_a_cpu_is_told_to_be_slow_once(
    dtype: str, lines: int, ranks: int, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with LLM(dtype=dtype, device="cpu", num_blocks=16, tensor_parallel_size=ranks):
        told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [line.startswith("dtype=float16 is slow on a CPU; use dtype=auto") for line in told] == [True] * lines
    assert "dtype=float16" not in capfd.readouterr().err  # of the ranks
