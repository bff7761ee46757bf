"""What a figure could be at best: the bytes that must be read, at the speed of a plain stream measured in this run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexmoe.config.model import ModelConfig
from flexmoe.planner.floor import expected_distinct, floor
from harness.pool import child_environment
from harness.setups import Load

# In a process of its own: what it reads would count as memory of all processes that this one starts.
_BANDWIDTH = """
import sys, torch
from flexmoe.bench.bandwidth import read_bandwidth
torch.set_num_threads(int(sys.argv[1]))
print(read_bandwidth(torch.device("cpu"), 2.0))
"""
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def measure_bandwidth(threads: int) -> float:
    """Bytes a second, by so many threads."""
    command = [sys.executable, "-c", _BANDWIDTH, str(threads)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=True)
    return float(done.stdout)


@dataclass(frozen=True)
class Floors:
    """Of one model. bandwidth: bytes a second."""

    config: ModelConfig
    bandwidth: float

    def of_load(
        self, load: Load, distinct: Sequence[float], median: float, dtype: str, quantization: str | None = None
    ) -> dict[str, Any]:
        """What a row says of it. distinct: experts that a decode step reads, layer by layer. median: of the figure.

        A step reads what its rows need; a prompt all experts that so many tokens choose; a throughput is held against
        its decode steps alone, with all requests in each.
        """
        size = _SIZES[dtype]
        if load.figure == "ttft":
            tokens = load.batch * load.prompt
            distinct = expected_distinct(self.config, tokens)
            needed = floor(self.config, tokens, 0, size, distinct, quantization).total
        else:
            needed = floor(self.config, load.batch, load.prompt + load.new / 2, size, distinct, quantization).total
        if load.figure == "rate":
            needed *= load.new - 1
            median = load.batch * load.new / median * 1e3
        found = self._row(needed, median)
        return found | {"distinct_experts": round(sum(distinct) / len(distinct), 2)} if distinct else found

    def of_start(self, seconds: float, dtype: str, quantization: str | None = None) -> dict[str, Any]:
        """Of a start, which reads each weight once."""
        config = self.config
        experts = [float(config.moe.num_experts)] * sum(layer.is_moe for layer in config.layers) if config.moe else []
        needed = floor(config, config.vocab_size, 0, _SIZES[dtype], experts, quantization).total
        return self._row(needed, seconds * 1e3)

    def _row(self, needed: float, ms: float) -> dict[str, Any]:
        least = needed / self.bandwidth * 1e3
        return {
            "floor_ms": round(least, 4),
            "percent_of_floor": round(100 * least / ms, 2),
            "read_gb_s": round(self.bandwidth / 1e9, 1),
        }
