"""What decode steps launch compiles for a GPU, also where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.support import ON_GPU

# Every kernel of a step but those that only measured tiles choose.
KERNELS = {
    "_all_reduce", "_combine", "_combine_norm", "_count_choices", "_direct", "_dot", "_down_gemv", "_down_grouped",
    "_embed", "_first", "_gate_up_gemv", "_gate_up_grouped", "_group_by_expert", "_peaks", "_prefill_attention",
    "_qk_norm", "_reduce", "_reduce_norm", "_rms_norm", "_rotate_and_store", "_route_few", "_route_many", "_topk",
    "_winner", "merge_kernel", "split_kernel",
}  # fmt: skip


@pytest.mark.skipif(ON_GPU, reason="there they run, which says more")
def test_every_launch_of_a_step_compiles_for_hopper() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_launches"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = json.loads(done.stdout.splitlines()[-1])
    assert set(compiled) >= KERNELS
