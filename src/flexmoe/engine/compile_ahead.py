"""Processes that compile kernels while the engine is at work already. Enters: what was started. Leaves: a handle.

A kernel is compiled when a step first launches it, which takes a second, and there are some hundred of them for all the
numbers of rows that steps can have. So other processes do that from the start, in the background
(`engine/compile_worker.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch

from flexmoe.config.engine import EngineConfig
from flexmoe.engine.compile_worker import Job
from flexmoe.engine.ranks import StartedRanks
from flexmoe.engine.startup import Started
from flexmoe.kernels import gpu
from flexmoe.models.hopper import HopperKernels

_log = logging.getLogger(__name__)
_MOST_WORKERS = 8


def compiling_ahead(started: Started | StartedRanks, options: EngineConfig, tokens: int) -> CompilingAhead:
    """For an engine that takes so many tokens a step; without workers if its kernels are not Triton's, or on ranks."""
    if not isinstance(started, Started) or started.graphed is None or not options.device.compile_ahead:
        return CompilingAhead(None)
    device, rows = started.device, started.graphed.max_rows
    shared, _ = gpu.shared_memory()
    hopper = HopperKernels() if started.prompts is None else started.prompts.hopper
    job = Job(
        hf_config=dict(started.source.hf_config), dtype=str(started.dtype).removeprefix("torch."),
        gpu=torch.cuda.get_device_name(device), capability=torch.cuda.get_device_capability(device), shared=shared,
        block_size=started.cache.block_size, max_position=started.max_model_len, rows=rows, tokens=tokens,
        exact_router=_has_exact_router(started), attends=hopper.attention is not None,
        multiplies=hopper.products is not None,
    )  # fmt: skip
    return CompilingAhead(job)


def _has_exact_router(started: Started) -> bool:
    """Of its layers with experts the first one tells: a checkpoint has all routers in one dtype."""
    from flexmoe.models.fused_experts import narrowest

    routers = (layer.moe.router.weight.data for layer in started.model.decoder_layers if layer.moe is not None)
    return all(narrowest(weight, started.dtype).dtype is started.dtype for weight in islice(routers, 1))


class CompilingAhead:
    """Workers of a job, unless they have been through it before."""

    def __init__(self, job: Job | None, workers: int | None = None) -> None:
        """job: None for nothing. workers: None: half of the processors, up to eight. The engine can do without them."""
        self._workers: list[subprocess.Popen[str]] = []
        if job is not None:
            self._start(job, workers)

    def _start(self, job: Job, workers: int | None) -> None:
        count = workers or max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // 2))
        done = _done(job, count)
        if all(path.exists() for path in done):
            return
        try:
            for number, path in enumerate(done):
                self._workers.append(_worker(job.line(number, count, path)))
                # One that is through would stay in the table of processes until somebody asks how it ended.
                threading.Thread(target=self._workers[-1].wait, name="flexmoe.compiling", daemon=True).start()
        except OSError as error:
            _log.debug("kernels are not compiled ahead: %s", error)

    @property
    def busy(self) -> bool:
        """Whether any is still at work."""
        return any(worker.poll() is None for worker in self._workers)

    def wait(self) -> None:
        """Until all has been compiled."""
        for worker in self._workers:
            worker.wait()
        self.close()

    def close(self) -> None:
        """End those that are still at work."""
        for worker in self._workers:
            worker.kill()
            worker.wait()
            if worker.stdin:
                worker.stdin.close()
        self._workers = []


def _worker(line: str) -> subprocess.Popen[str]:
    nothing = subprocess.DEVNULL
    # Without a GPU, so that it takes no memory there.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    worker = subprocess.Popen(
        [sys.executable, "-m", "flexmoe.engine.compile_worker"], stdin=subprocess.PIPE, stdout=nothing, stderr=nothing,
        text=True, env=environment, process_group=0,  # a terminal's Ctrl-C is not for it
    )  # fmt: skip
    assert worker.stdin is not None
    worker.stdin.write(line)
    worker.stdin.flush()
    return worker


def _done(job: Job, workers: int) -> list[Path]:
    """Files that workers make when they are through: among the kernels, so that whoever deletes those deletes them."""
    import triton  # whoever compiles ahead for a GPU has it already

    from flexmoe.kernels.triton.tiles import tiles_of

    tiles = [repr(measured) for measured in tiles_of(job.gpu).measured()]
    about = [asdict(job), tiles, torch.__version__, triton.__version__, _sources()]
    key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = Path(triton.knobs.cache.dir) / "flexmoe-compiled"
    return [folder / f"{key}-{number + 1}-of-{workers}" for number in range(workers)]


def _sources() -> str:
    """A digest of our kernels and of what launches them: after a change of them all is gone through anew."""
    digest, package = hashlib.sha256(), Path(gpu.__file__).parents[1]
    for folder in ("kernels/triton", "kernels/hopper", "models", "engine"):
        for path in sorted((package / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
