"""What decode steps launch compiles for a GPU, also where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.kernels.support import ON_GPU

# Every kernel of a step but those that only measured tiles choose.
KERNELS = {
    "_all_reduce", "_begin_rows", "_combine", "_combine_norm", "_copy_by_expert", "_count_choices", "_direct",
    "_dot", "_down_gemv", "_down_grouped", "_embed", "_fetch", "_first", "_gate_up_gemv", "_gate_up_grouped",
    "_gather_rows", "_group_by_expert", "_peaks", "_prefill_attention", "_qk_norm", "_reduce", "_reduce_norm",
    "_rms_norm", "_rotate_and_store", "_route_few", "_route_many", "_topk", "_winner", "merge_kernel",
    "split_kernel",
}  # fmt: skip


def run(module: str, *arguments: str) -> Any:
    """What the module says, by Triton's compiler instead of its interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.kernels.{module}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(ON_GPU, reason="there they run, which says more")
def test_every_launch_of_a_step_compiles_for_hopper() -> None:
    assert set(run("compile_launches")) >= KERNELS


def test_whoever_compiles_ahead_foresees_every_launch() -> None:
    assert run("unforeseen_launches") == []


def test_a_kernel_has_one_cache_key_whatever_was_launched_before_it() -> None:
    """Triton's own depends on that: with it, this test was seen to fail."""
    keys = run("cache_keys", "forwards")
    assert {name.partition(":")[2] for name in keys} >= KERNELS
    assert run("cache_keys", "backwards") == keys
