"""`flexmoe tune`: find the tiles that suit this GPU for a model's decode steps.

Enters: a model's shapes, numbers of rows, and seconds. Leaves: a table, what it brings, and what time did not reach.
Tiles are judged by the time of a whole step in which one of them is changed. Each job's tiles are tried in rounds, some
that are like the best so far and some from all over, and jobs take turns, so that a short run improves a little
everywhere. A tile must give what the operation's own choice gives, and save some of the step's time in a duel, too.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from flexmoe.bench.kernel_timer import time_launches
from flexmoe.bench.tune_candidates import nearest_first
from flexmoe.bench.tune_jobs import JOBS, Job, Setting, jobs
from flexmoe.bench.tune_step import Inputs, MiniModel, Timer
from flexmoe.config.engine import MAX_ROWS
from flexmoe.config.model import ModelConfig
from flexmoe.engine.device import choose_dtype
from flexmoe.errors import ConfigError
from flexmoe.kernels.triton.tiles import Limit, Measured, TileTable, Work, expert_work, grouping_work, tiles_for
from flexmoe.models.device_rows import why_not_fused
from flexmoe.models.fused import FusedDecoder
from flexmoe.models.fused_tiles import MOST_RANKED

_log = logging.getLogger(__name__)

LIMITS = "limits"
OPS = (*JOBS, LIMITS)

_ROUND = 8  # tiles of a job that are compiled at once
_THREADS = 16
_PATIENCE = 2  # rounds of a job that bring nothing, before it is left
_MARGIN = 1.003  # of a layer's time; the least that a duel tells from chance
_DUELS = 3
_TOLERANCE = 2e-2  # relative distance of results; across tiles sums are rounded in another order
_TILE_SHARE = 0.85  # of the time; the rest is for limits, and to see what all tiles bring together
_ALONE_STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 12)
_GROUP_STEPS = (2, 4, 8, 16, 32, 64, 128, 256)

Notify = Callable[[str], None]
Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(slots=True)
class Contest:
    """A job and its state. tile: the best so far, at first what was known before, None: the operation's own choice.
    Microseconds are of a layer, or of a step of one layer and the head: `us` with the best tile, 0 if never timed;
    `default_us` before it had won.
    """

    job: Job
    waiting: list[Any]
    tile: Any = None
    us: float = 0.0
    default_us: float = 0.0
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

    def take(self, many: int) -> list[Any]:
        """The next tiles: half of them those most like the best, the others from all over the rest."""
        near, rest = self.waiting[: many // 2], self.waiting[many // 2 :]
        others = many - many // 2
        far = rest[:: max(1, len(rest) // others)][:others]
        self.waiting = [tile for tile in rest if tile not in far]
        return near + far

    def settle(self, won: bool) -> None:
        """After a round. Tiles most like the winner are next; a job that gains no more is left."""
        self.idle = 0 if won else self.idle + 1
        if self.idle >= _PATIENCE:
            self.waiting = []
        elif won:
            self.waiting = nearest_first(self.waiting, self.tile)


@dataclass(frozen=True, slots=True)
class Effect:
    """What all tiles bring together: microseconds a layer, before and after. moved: bytes that a layer reads."""

    rows: int
    before: float
    after: float
    moved: float


@dataclass(slots=True)
class Tuned:
    """contests: all jobs. lost: the error that ended the run before its time, or ""."""

    contests: list[Contest] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    lost: str = ""

    @property
    def table(self) -> TileTable:
        """What was measured."""
        return TileTable((contest.measured() for contest in self.contests if contest.us), self.limits)

    def unfinished(self) -> list[Contest]:
        """Jobs with tiles that time did not suffice to try."""
        return [contest for contest in self.contests if contest.waiting]


def tune_model(
    config: ModelConfig, device: torch.device, dtype: str, batches: Sequence[int], ops: Sequence[str], seconds: float,
    notify: Notify,
) -> Tuned:  # fmt: skip
    """Tune for a model on a CUDA device. dtype "auto": the checkpoint's. Raises ConfigError for what has no kernels."""
    reason = why_not_fused(config, device, "triton", block_size=1)
    if reason:
        raise ConfigError(f"this model's decode steps do not run in the kernels that could be tuned: {reason}.")
    if max(batches) > MAX_ROWS:
        raise ConfigError(f"batch={max(batches)} is more than the {MAX_ROWS} rows that a decode step can have.")
    setting = Setting(config, choose_dtype(dtype, config, device, few_rows_in_c=False))
    return Tuner(setting, device, tiles_for(device), notify=notify).run(batches, ops, seconds)


class _DeviceLostError(Exception):
    """No more work can be done."""


class Tuner:
    """One run. known: tiles measured before: where it begins, and what operations take that are not tuned."""

    def __init__(
        self,
        setting: Setting,
        device: torch.device,
        known: TileTable,
        *,
        notify: Notify = lambda _: None,
        timer: Timer = time_launches,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._setting, self._device, self._known = setting, device, known
        self._notify, self._timer, self._clock = notify, timer, clock
        self._minis: dict[bool, MiniModel] = {}
        self._tuned = Tuned()

    def run(self, batches: Sequence[int], ops: Sequence[str], seconds: float) -> Tuned:
        """Tune the operations, then the limits. Stops after `seconds`, but for the round that it is in."""
        start, tuned = self._clock(), self._tuned
        for job in (job for rows in batches for job in jobs(self._setting, rows, ops)):
            known = self._known.tile(job.work, job.rows)
            first = known or job.default
            others = [tile for tile in dict.fromkeys((job.default, *job.candidates)) if tile != first]
            tuned.contests.append(Contest(job, nearest_first(others, first), None if first == job.default else known))
        with torch.cuda.device_of(torch.empty(0, device=self._device)):
            try:
                for head in sorted({contest.job.head for contest in tuned.contests}):
                    self._ready(self._mini(head), [(rows, self._known) for rows in batches])
                self._rounds(start + seconds * _TILE_SHARE)
                if LIMITS in ops:
                    self._limits(start + seconds)
                self._effects(batches, start + seconds)
            except (_DeviceLostError, torch.cuda.OutOfMemoryError) as error:
                tuned.lost = str(error).splitlines()[0]
        return tuned

    def _rounds(self, end: float) -> None:
        number, contests = 0, self._tuned.contests
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
        job, mini = contest.job, self._mini(contest.job.head)
        tiles = contest.take(_ROUND)
        inputs = mini.inputs(job.rows, long=job.long)
        incumbent = mini.decoder(self._table(contest, contest.tile), job.rows)
        default = mini.decoder(self._table(contest, None), job.rows) if contest.tile else incumbent
        wanted = mini.output(default, inputs, job.stage)  # compiles what all tiles share
        contest.us = mini.microseconds(incumbent, inputs)
        contest.default_us = contest.default_us or contest.us
        best: tuple[float, Any, FusedDecoder] | None = None
        for tile, decoder in self._compiled(contest, mini, inputs, tiles):
            try:
                found = mini.output(decoder, inputs, job.stage)
                apart = float((found - wanted).norm() / wanted.norm())
                if not apart < _TOLERANCE:
                    raise ArithmeticError(f"its result is off by {apart:.1e}")
                us = mini.microseconds(decoder, inputs)
            except Exception as error:  # noqa: BLE001 - whatever a candidate raises, the others shall run
                contest.fail(tile, error)
                self._recover()
                continue
            best = min(best or (us, tile, decoder), (us, tile, decoder), key=lambda one: one[0])
        contest.settle(best is not None and self._duel(contest, mini, inputs, incumbent, best))

    def _duel(
        self,
        contest: Contest,
        mini: MiniModel,
        inputs: Inputs,
        incumbent: FusedDecoder,
        rival: tuple[float, Any, FusedDecoder],
    ) -> bool:
        """Whether the rival beats the incumbent once more, taking turns; it then takes its place."""
        us, tile, decoder = rival
        if us * _MARGIN >= contest.us:
            return False
        ours, theirs = self._both(mini, inputs, decoder, incumbent)
        if contest.tile is None:
            contest.default_us = theirs
        contest.us = theirs
        if ours * _MARGIN >= theirs:
            return False
        contest.tile, contest.us = tile, ours
        return True

    def _compiled(
        self, contest: Contest, mini: MiniModel, inputs: Inputs, tiles: Sequence[Any]
    ) -> list[tuple[Any, FusedDecoder]]:
        """Those that run, each with a decoder that has run once: in several threads, most of it needs no lock."""

        def compiled(tile: Any) -> FusedDecoder | Exception:
            try:
                with torch.cuda.device_of(inputs.rows.lengths):
                    decoder = mini.decoder(self._table(contest, tile), contest.job.rows)
                    mini.run(decoder, inputs)
            except Exception as error:  # noqa: BLE001 - as above
                return error
            return decoder

        made: list[tuple[Any, FusedDecoder]] = []
        for tile, result in zip(tiles, self._in_threads(compiled, tiles), strict=True):
            if isinstance(result, Exception):
                contest.fail(tile, result)
            else:
                made.append((tile, result))
        self._recover()
        return made

    def _ready(
        self, mini: MiniModel, wanted: Sequence[tuple[int, TileTable]]
    ) -> list[tuple[int, Inputs, FusedDecoder]]:
        """Decoders for numbers of rows and tables, and inputs for them, compiled by a step."""

        def ready(one: tuple[int, TileTable]) -> tuple[int, Inputs, FusedDecoder]:
            rows, table = one
            with torch.cuda.device_of(torch.empty(0, device=self._device)):
                inputs, decoder = mini.inputs(rows), mini.decoder(table, rows)
                mini.run(decoder, inputs)
            return rows, inputs, decoder

        made = self._in_threads(ready, wanted)
        self._recover()
        return made

    def _in_threads(self, function: Callable[[Given], Made], given: Sequence[Given]) -> list[Made]:
        # Triton's interpreter, in which CPUs test this, takes one launch at a time.
        many = min(_THREADS, os.cpu_count() or 1) if self._device.type == "cuda" else 1
        with ThreadPoolExecutor(many) as pool:
            return list(pool.map(function, given))

    def _table(self, contest: Contest, tile: Any) -> TileTable:
        """All that is known, this tile, and the regime in which it is used."""
        job, limits = contest.job, []
        if job.work.op.startswith("expert_"):
            limits = [Limit(self._alone(), job.rows if job.work.op.endswith("_gemv") else 0)]
        changed = TileTable([Measured(job.work, job.rows, tile, 0.0, 0.0)], limits)
        return self._known.with_(self._tuned_or_untouched()).with_(changed)

    def _tuned_or_untouched(self) -> TileTable:
        """The best tiles of this run; where it has none yet, the operations' own."""
        return TileTable((contest.measured() for contest in self._tuned.contests), self._tuned.limits)

    def _limits(self, end: float) -> None:
        moe, tuned = self._setting.config.moe, self._tuned
        if moe is None:
            return
        alone, one = self._alone(), grouping_work(self._setting.dtype, moe)
        if moe.num_experts <= MOST_RANKED:
            tuned.limits += self._crossing(one, _GROUP_STEPS, [Limit(alone, 0)], end)
        tuned.limits += self._crossing(alone, _ALONE_STEPS, [], end)

    def _crossing(self, work: Work, steps: Sequence[int], fixed: list[Limit], end: float) -> Iterator[Limit]:
        """The last step up to which the way with the limit is no slower; nothing if time runs out before."""
        if self._clock() > end:
            return
        mini, known, last = self._mini(False), self._known.with_(self._tuned_or_untouched()), 0
        wanted = [
            (rows, known.with_(TileTable(limits=[*fixed, Limit(work, limit)]))) for rows in steps for limit in (rows, 0)
        ]
        made = self._ready(mini, wanted)
        for (rows, inputs, first), (_, _, second) in zip(made[::2], made[1::2], strict=True):
            with_it, without = self._both(mini, inputs, first, second)
            self._notify(f"{work.op}, {rows} rows: {with_it:.2f} us a layer; the other way {without:.2f}")
            if with_it > without:
                break
            last = rows
        yield Limit(work, last)

    def _effects(self, batches: Sequence[int], end: float) -> None:
        mini = self._mini(False)
        for rows in batches:
            if self._clock() > end:
                return
            inputs = mini.inputs(rows)
            ways = [mini.decoder(table, rows) for table in (TileTable(), self._known.with_(self._tuned.table))]
            before, after = self._both(mini, inputs, *ways)
            self._tuned.effects.append(Effect(rows, before, after, mini.moved(rows)))

    def _both(self, mini: MiniModel, inputs: Inputs, first: FusedDecoder, second: FusedDecoder) -> tuple[float, float]:
        """The microseconds of two that take turns."""
        times = [(mini.microseconds(first, inputs), mini.microseconds(second, inputs)) for _ in range(_DUELS)]
        return min(one for one, _ in times), min(other for _, other in times)

    def _alone(self) -> Work:
        setting = self._setting
        assert setting.config.moe is not None
        return expert_work("expert_gemv", setting.dtype, setting.config.hidden_size, setting.config.moe)

    def _mini(self, head: bool) -> MiniModel:
        if head not in self._minis:
            self._notify(f"a model of {'one layer and the head' if head else 'a few layers'}, with random weights")
            setting = self._setting
            self._minis[head] = MiniModel(setting.config, setting.dtype, self._device, head=head, timer=self._timer)
        return self._minis[head]

    def _recover(self) -> None:
        """Free what failed held. Raises _DeviceLostError if a launch has broken the GPU for this process."""
        if self._device.type != "cuda":
            return
        gc.collect()
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise _DeviceLostError(str(error).splitlines()[0]) from error
