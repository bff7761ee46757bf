"""What the planner expects of a plan, in the terms of benchmarks/strategies.py. Enters: a machine. Leaves: figures.

And how far that was off, once it has been measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flexmoe.config.engine import SchedulerConfig
from flexmoe.config.machine import Machine
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.shard import check
from flexmoe.planner.planning import BLOCK, Setting
from flexmoe.planner.replica import EngineLimits
from flexmoe.planner.simulator import Fleet, simulate
from flexmoe.planner.steps import Terms
from flexmoe.planner.trace import TraceRequest
from flexmoe.planner.validation import Check

Row = dict[str, Any]


class Expected:
    """A plan of a model on a machine's first devices."""

    def __init__(
        self, name: str, model: ModelConfig, machine: Machine, plan: ParallelPlan, dtype: str, limits: SchedulerConfig
    ) -> None:
        """limits: of the engine that would run it. Raises ConfigError if the plan misfits the model."""
        check(plan, model)
        self._plan, self._limits = plan, limits
        self._setting = Setting.of(name, model, machine, dtype).resized(plan.num_ranks)
        most = self._setting.step_tokens.asked(limits.max_num_batched_tokens).widest  # nobody reads along
        self._steps = self._setting.steps(plan, replace(limits, max_num_batched_tokens=most))

    def decode(self, batch: int, context: int) -> Row:
        """A step that gives each of so many requests a token."""
        rows = -(-batch // self._plan.data_parallel_size)
        return _figures("step_ms", self._steps.decode(rows, context))

    def first_token(self, length: int) -> Row:
        """Of one prompt."""
        return _figures("first_token_ms", self._steps.prompt(length))

    def many(self, requests: int, prompt_len: int, output_len: int) -> Row:
        """All at once, nobody watching. Raises ConfigError if one of them does not fit."""
        steps = self._steps
        engine = EngineLimits(
            scheduler=self._limits, num_blocks=steps.kv_tokens // BLOCK, block_size=BLOCK, watched=False,
            data_ranks=self._plan.data_parallel_size, tokens=self._setting.step_tokens, ahead=steps.ahead,
        )  # fmt: skip
        asked = [TraceRequest(0.0, prompt_len, output_len)] * requests
        served = simulate(Fleet(engine, steps.seconds, self._plan.num_ranks, 1, 1), asked).served
        seconds = max(one.end for one in served if one.end is not None)
        tokens = sum(one.output_len for one in served)
        return {"seconds": round(seconds, 4), "output_tokens_per_s": round(tokens / seconds, 2)}


def _figures(name: str, terms: Terms) -> Row:
    by_term = {term: round(1e3 * seconds, 4) for term, seconds in terms.items() if seconds}
    return {name: round(1e3 * sum(terms.values()), 4), "terms_ms": by_term}


def foretold(predicted: Sequence[Row], measured: Sequence[Row]) -> Iterator[tuple[str, list[Check]]]:
    """Rows of --predict beside those of a run that they were made for: steps, first tokens, many requests; and choices.

    A choice is what the strategy that was expected to be the fastest took, beside what the fastest took.
    """
    expected = {_key(row): row["result"] for row in predicted if "error" not in row["result"]}
    checks: dict[str, list[Check]] = defaultdict(list)
    rivals: dict[Hashable, list[tuple[float, float]]] = defaultdict(list)
    for row in measured:
        ours, theirs = expected.get(_key(row)), row["result"]
        if row["engine"] != "flexmoe" or ours is None or "error" in theirs:
            continue
        name = next(name for name in ("step_ms", "first_token_ms", "seconds") if name in ours)
        took = middle(theirs[name])
        unit = 1.0 if name == "seconds" else 1e-3
        checks[name].append(Check(" ".join(map(str, _key(row))), unit * ours[name], unit * took))
        if row["config"].get("ranks", 1) > 1:
            model, _, *asked = _key(row)
            rivals[model, *asked].append((ours[name], took))
    yield from checks.items()
    yield "choices", [
        Check(" ".join(map(str, asked)), min(pairs)[1], min(took for _, took in pairs))  # type: ignore[arg-type]
        for asked, pairs in rivals.items() if len(pairs) > 1
    ]  # fmt: skip


def middle(figure: float | Mapping[str, float]) -> float:
    """Of what was measured several times the median."""
    return figure["median"] if isinstance(figure, Mapping) else figure


def _key(row: Row) -> tuple[Any, ...]:
    model, config, params = row["model"], row["config"], row["params"]
    asked = config.get("ranks", 1), params.get("batch"), params.get("prompt_len")
    return (model["label"], config["strategy"], model["layers"], *asked)
