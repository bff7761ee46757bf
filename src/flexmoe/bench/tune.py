"""`flexmoe tune`: find the tiles that suit this GPU for a model's decode steps.

Enters: a model's shapes, numbers of rows, and seconds. Leaves: a TileTable, and what the rest of the time did not
reach. Each job's tiles are tried in rounds, those most like the best so far first, and jobs take turns, so that a short
run improves a little everywhere. A tile must give what the operation's own choice gives, and beat it by 2% in a duel.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexmoe.bench.kernel_timer import Launch, Timing, time_launches
from flexmoe.bench.tune_candidates import nearest_first
from flexmoe.bench.tune_experts import (
    FEW_ROWS,
    ExpertSet,
    expert_sets,
    few_experts,
    few_jobs,
    group_in_one,
    group_in_two,
    many_experts,
    many_jobs,
    routing_sets,
)
from flexmoe.bench.tune_jobs import Inputs, Job, Setting, attention_jobs, linear_jobs, route_jobs
from flexmoe.config.model import ModelConfig
from flexmoe.engine.device import choose_dtype
from flexmoe.errors import ConfigError
from flexmoe.kernels.triton.tiles import (
    Limit,
    Measured,
    TileTable,
    Work,
    expert_work,
    grouping_work,
    tiles_for,
)
from flexmoe.models.device_rows import MAX_ROWS, PDL_CAPABILITY, why_not_fused
from flexmoe.models.fused_tiles import MOST_RANKED, StepTiles

_log = logging.getLogger(__name__)

_JOBS: dict[str, Callable[[Setting, int], Iterator[Job]]] = {
    "norm_linear": linear_jobs,
    "decode_attention": attention_jobs,
    "route": route_jobs,
    "expert_gate_up_gemv": few_jobs,
    "expert_down_gemv": few_jobs,
    "expert_gate_up_grouped": many_jobs,
    "expert_down_grouped": many_jobs,
}
LIMITS = "limits"
OPS = (*_JOBS, LIMITS)

_TILES_A_ROUND = 8  # compiled at once, in as many threads
_PATIENCE = 3  # rounds of a job that bring nothing, before it is left
_MARGIN, _SMALL_MARGIN = 1.02, 1.005  # a tile must beat the operation's own choice, and another tile, by so much
_DUELS = 2
_TOLERANCE = 2e-2  # relative distance of results; across tiles sums are rounded in another order
_TILE_SHARE = 0.85  # of the time; the rest is for limits
_FEW_STEPS = (1, 2, 3, 4, 5, 6, 8, 12, FEW_ROWS)
_GROUP_STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Timer = Callable[[list[Launch]], Timing]


@dataclass(slots=True)
class Contest:
    """A job and its state. us: of the incumbent, which is the default (tile None) until one beats it. 0: not timed."""

    job: Job
    waiting: list[Any]
    tile: Any = None
    us: float = 0.0
    default_us: float = 0.0
    moved: float = 0.0
    idle: int = 0
    failures: list[str] = field(default_factory=list)

    def measured(self) -> Measured:
        """For the table."""
        return Measured(self.job.work, self.job.rows, self.tile, self.us, self.default_us)

    def fail(self, tile: Any, error: Exception) -> None:
        """Note that a tile, or the job (None), does not work."""
        said = (str(error).strip().splitlines() or [""])[0]
        self.failures.append(f"{tile or self.job.name}: {type(error).__name__} {said}")
        _log.info("%s, %d rows: %s", self.job.name, self.job.rows, self.failures[-1])
        error.__traceback__ = None  # its frames hold buffers

    def settle(self, won: bool) -> None:
        """After a round. Tiles most like the winner are next; a job that gains no more is left."""
        self.idle = 0 if won else self.idle + 1
        if self.idle >= _PATIENCE:
            self.waiting = []
        elif won:
            self.waiting = nearest_first(self.waiting, self.tile)


@dataclass(frozen=True, slots=True)
class Tuned:
    """table: what was measured. contests: all jobs. lost: the error after which the GPU took no more work, or ""."""

    table: TileTable
    contests: list[Contest]
    limits: list[Limit]
    lost: str

    def unfinished(self) -> list[Contest]:
        """Jobs with tiles that time did not suffice to try."""
        return [contest for contest in self.contests if contest.waiting]


def tune_model(
    config: ModelConfig,
    device: torch.device,
    dtype: str,
    batches: Sequence[int],
    ops: Sequence[str],
    seconds: float,
    notify: Callable[[str], None],
) -> Tuned:
    """Tune for a model on a CUDA device. dtype "auto": the checkpoint's. Raises ConfigError for what has no kernels."""
    reason = why_not_fused(config, device, "triton")
    if reason:
        raise ConfigError(f"this model's decode steps do not run in the kernels that could be tuned: {reason}.")
    if max(batches) > MAX_ROWS:
        raise ConfigError(f"batch={max(batches)} is more than the {MAX_ROWS} rows that a decode step can have.")
    pdl = torch.cuda.get_device_capability(device) >= PDL_CAPABILITY
    setting = Setting(config, choose_dtype(dtype, config, device, few_rows_in_c=False), device, pdl)
    return Tuner(setting, tiles_for(device), notify=notify).run(batches, ops, seconds)


class _DeviceLostError(Exception):
    """No more work can be done."""


class Tuner:
    """One run. known: tiles measured before, which limits are measured with where this run brings none."""

    def __init__(
        self,
        setting: Setting,
        known: TileTable,
        *,
        notify: Callable[[str], None] = lambda _: None,
        timer: Timer = time_launches,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._setting, self._known, self._notify = setting, known, notify
        self._timer, self._clock = timer, clock

    def run(self, batches: Sequence[int], ops: Sequence[str], seconds: float) -> Tuned:
        """Tune the operations, then the limits. Stops after `seconds`, but for the round that it is in."""
        start = self._clock()
        share = _TILE_SHARE if LIMITS in ops else 1.0
        contests = [Contest(job, _others(job)) for job in self._jobs(batches, ops)]
        limits: list[Limit] = []
        lost = ""
        with torch.cuda.device_of(torch.empty(0, device=self._setting.device)), torch.inference_mode():
            try:
                self._rounds(contests, start + seconds * share)
                table = self._known.with_(_table(contests))
                if LIMITS in ops:
                    limits = list(self._limits(table, start + seconds))
            except _DeviceLostError as error:
                lost = str(error)
        return Tuned(_table(contests).with_(TileTable(limits=limits)), contests, limits, lost)

    def _jobs(self, batches: Sequence[int], ops: Sequence[str]) -> Iterator[Job]:
        """Rows by rows, in the order asked for: a short run tunes all operations of the first."""
        for rows in batches:
            for op in (op for op in _JOBS if op in ops):
                yield from (job for job in _JOBS[op](self._setting, rows) if job.work.op == op)

    def _rounds(self, contests: list[Contest], end: float) -> None:
        number = 0
        while waiting := [contest for contest in contests if contest.waiting]:
            number += 1
            self._notify(f"round {number}: {len(waiting)} of {len(contests)} jobs")
            for contest in waiting:
                if self._clock() > end:
                    return
                try:
                    self._round(contest)
                except torch.cuda.OutOfMemoryError as error:
                    contest.waiting = []
                    contest.fail(None, error)
                    self._recover()

    def _round(self, contest: Contest) -> None:
        job = contest.job
        inputs = [part() for part in job.parts]
        tiles, contest.waiting = contest.waiting[:_TILES_A_ROUND], contest.waiting[_TILES_A_ROUND:]
        self._compile(inputs, tiles if contest.us else [job.default, *tiles])
        wanted = [_output(part, job.default) for part in inputs]
        if not contest.us:
            contest.us = contest.default_us = self._time(inputs, job.default)
            contest.moved = _mean([part.moved for part in inputs])
        times = []
        for number, tile in enumerate(tiles):
            us = self._try(contest, inputs, wanted, tile)
            if us is not None:
                times.append((us, number))
        contest.settle(bool(times) and self._duel(contest, inputs, tiles[min(times)[1]], min(times)[0]))

    def _try(self, contest: Contest, inputs: list[Inputs], wanted: list[Tensor], tile: Any) -> float | None:
        """Microseconds of a tile; None if it fails or gives something else."""
        try:
            for part, right in zip(inputs, wanted, strict=True):
                apart = _distance(_output(part, tile), right)
                if not apart < _TOLERANCE:
                    raise ArithmeticError(f"its result is off by {apart:.1e}")
            return self._time(inputs, tile)
        except Exception as error:  # noqa: BLE001 - whatever a candidate raises, the others shall run
            contest.fail(tile, error)
        self._recover()
        return None

    def _compile(self, inputs: list[Inputs], tiles: Sequence[Any]) -> None:
        """Compile in several threads at once, by one launch each: most of it is not Python and needs no lock."""

        def launch(tile: Any) -> None:
            # What fails here fails again when it is tried, and is told then.
            with torch.cuda.device_of(inputs[0].out), torch.inference_mode(), contextlib.suppress(Exception):
                inputs[0].launches(tile)[0]()

        with ThreadPoolExecutor(min(len(tiles), os.cpu_count() or 1)) as pool:
            list(pool.map(launch, tiles))
        self._recover()

    def _recover(self) -> None:
        """Free what failed held. Raises _DeviceLostError if a launch has broken the GPU for this process."""
        if self._setting.device.type != "cuda":
            return
        gc.collect()
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise _DeviceLostError(str(error).splitlines()[0]) from error

    def _duel(self, contest: Contest, inputs: list[Inputs], tile: Any, us: float) -> bool:
        """Whether the tile beats the incumbent once more, taking turns; it then is the incumbent."""
        margin = _MARGIN if contest.tile is None else _SMALL_MARGIN
        if us * margin >= contest.us:
            return False
        incumbent = contest.job.default if contest.tile is None else contest.tile
        ours, theirs = zip(
            *((self._time(inputs, tile), self._time(inputs, incumbent)) for _ in range(_DUELS)), strict=True
        )
        contest.us = min(theirs)
        if contest.tile is None:
            contest.default_us = contest.us
        if min(ours) * margin >= min(theirs):
            return False
        contest.tile, contest.us = tile, min(ours)
        return True

    def _time(self, inputs: list[Inputs], tile: Any) -> float:
        return _mean([self._timer(part.launches(tile)).median for part in inputs])

    def _limits(self, table: TileTable, end: float) -> Iterator[Limit]:
        setting, moe = self._setting, self._setting.config.moe
        if moe is None:
            return
        self._notify("limits")
        if moe.num_experts <= MOST_RANKED:
            work, ways = grouping_work(setting.dtype, moe), (group_in_one, group_in_two)
            for limit in self._crossing(work, _GROUP_STEPS, routing_sets, ways, end):
                table = table.with_(TileTable(limits=[limit]))
                yield limit
        tiles = StepTiles(table, setting.config, setting.dtype)
        halves = [functools.partial(way, tiles=tiles) for way in (few_experts, many_experts)]
        work = expert_work("expert_gemv", setting.dtype, setting.config.hidden_size, moe)
        yield from self._crossing(work, _FEW_STEPS, expert_sets, halves, end)

    def _crossing(
        self,
        work: Work,
        steps: Sequence[int],
        sets: Callable[[Setting, int], list[ExpertSet]],
        ways: Sequence[Callable[[Setting, ExpertSet], None]],
        end: float,
    ) -> Iterator[Limit]:
        """The last step up to which the first of two ways is no slower; nothing if time runs out before."""
        last = 0
        for rows in steps:
            if self._clock() > end:
                return
            made = sets(self._setting, rows)
            first, second = (
                self._timer([functools.partial(way, self._setting, s) for s in made]).median for way in ways
            )
            self._notify(f"{work.op}, {rows} rows: {first:.1f} us, and {second:.1f} us the other way")
            if first > second:
                break
            last = rows
        yield Limit(work, last)


def _others(job: Job) -> list[Any]:
    return nearest_first((tile for tile in dict.fromkeys(job.candidates) if tile != job.default), job.default)


def _table(contests: Sequence[Contest]) -> TileTable:
    return TileTable(contest.measured() for contest in contests if contest.us)


def _output(inputs: Inputs, tile: Any) -> Tensor:
    """What one launch writes, in fp32."""
    inputs.out.fill_(inputs.start)
    inputs.launches(tile)[0]()
    return inputs.out.float().clone()


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _mean(values: Sequence[float]) -> float:
    """The geometric mean: each part counts by its ratio."""
    return math.exp(sum(map(math.log, values)) / len(values))
