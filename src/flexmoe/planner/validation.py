"""How far predictions are from what was measured. Enters: a machine, rows of steps. Leaves: errors.

Nothing is judged by what it was fitted to: an operation is predicted without its own sample, a step of a model without
all samples of that model's shapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean, median
from typing import Any

from flexmoe.config.engine import SchedulerConfig
from flexmoe.config.machine import Machine, Sample
from flexmoe.config.model import ModelConfig
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.server import usual_chunk_rate
from flexmoe.errors import ConfigError
from flexmoe.planner.captures import Captures
from flexmoe.planner.cost_model import Chunk, CostModel, StepShape
from flexmoe.planner.lookup import Lookup
from flexmoe.planner.operations import Operation
from flexmoe.planner.planning import Setting
from flexmoe.planner.replica import EngineLimits
from flexmoe.planner.simulator import Fleet, simulate
from flexmoe.planner.trace import TraceRequest

_LIMITS = ("max_num_seqs", "max_num_batched_tokens", "max_model_len")


@dataclass(frozen=True, slots=True)
class Check:
    """One prediction beside its measurement, in seconds."""

    what: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative; above 0 where too much was predicted."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True, slots=True)
class Errors:
    """Of several checks, without sign."""

    count: int
    mean: float
    p95: float
    worst: float

    @classmethod
    def of(cls, checks: Iterable[Check]) -> Errors:
        """Raises ValueError if there are none."""
        errors = sorted(abs(check.error) for check in checks)
        if not errors:
            raise ValueError("nothing was checked")
        return cls(len(errors), sum(errors) / len(errors), errors[int(0.95 * (len(errors) - 1))], errors[-1])


def leave_one_out(machine: Machine, least: float = 0.0) -> Iterator[Check]:
    """Each operation that takes `least` seconds, as the others predict it; ends of the table, which they do not reach,
    are extrapolated and left out.
    """
    for number, sample in enumerate(machine.samples):
        path, _, name = sample.op.partition(".")
        others = [s for i, s in enumerate(machine.samples) if i != number and _is_alike(s, sample)]
        if sample.seconds < least or not others:
            continue
        lookup = Lookup(replace(machine, samples=tuple(others)), sample.dtype, ranks=sample.ranks)
        found = lookup.estimate(path, Operation(name, sample.rows, sample.shape))
        if not found.extrapolated:
            yield Check(f"{sample.op} {sample.rows} {list(sample.shape)}", found.seconds, sample.seconds)


def _is_alike(one: Sample, other: Sample) -> bool:
    return (one.op, one.dtype, one.ranks) == (other.op, other.dtype, other.ranks)


def without_model(machine: Machine, model: ModelConfig) -> Machine:
    """The machine as if this model had not been measured."""
    kept = tuple(sample for sample in machine.samples if not _is_of(sample, model))
    return replace(machine, samples=kept)


def _is_of(sample: Sample, model: ModelConfig) -> bool:
    a, moe, hidden = model.attention, model.moe, model.hidden_size
    heads = a.num_heads, a.num_kv_heads, a.head_dim
    match sample.op.partition(".")[2]:
        case "linear":
            shapes = (model.qkv_size, hidden), (hidden, a.num_heads * a.head_dim), (model.vocab_size, hidden)
            return sample.shape in shapes
        case "head":
            return sample.shape == (model.vocab_size, hidden)
        case "attention" | "prompt":
            return sample.shape[1:4] == heads
        case "experts":
            return moe is not None and sample.shape[1:] == (hidden, moe.expert_width)
        case _:
            return moe is not None and sample.shape == (moe.num_experts, hidden, moe.top_k)


def step_checks(machine: Machine, model: ModelConfig, rows: Iterable[Mapping[str, Any]]) -> Iterator[Check]:
    """Decode steps of this model, in the middle of their answers: rows of `flexmoe bench latency`, or of
    benchmarks/strategies.py with the plan of each.
    """
    for row in rows:
        params, result = row["params"], row["result"]
        plan = ParallelPlan.from_json(row["config"].get("plan", {}))
        cost = CostModel(machine, model, plan, dtype=params["dtype"])
        rows_each = -(-params["batch"] // plan.data_parallel_size)
        shape = StepShape(rows_each, params["prompt_len"] + params["output_len"] / 2)
        yield Check(_name(row), cost.step(shape).seconds, measured_ms(result) * 1e-3)


def measured_ms(result: Mapping[str, Any]) -> float:
    """Of a row's result, a decode step: the median of those timed one by one, if there are, rather than the difference
    of two whole runs, which after a prompt of seconds is mostly what these two differ by.
    """
    steps = result.get("step_ms")
    return float(steps["median"] if steps else result["ms"])


def prompt_checks(machine: Machine, model: ModelConfig, rows: Iterable[Mapping[str, Any]]) -> Iterator[Check]:
    """The time to the first token, of all prompts computed in one step."""
    for row in rows:
        params, result = row["params"], row["result"]
        if params["batch"] * params["prompt_len"] <= row["config"]["max_num_batched_tokens"]:
            cost = CostModel(machine, model, ParallelPlan(), dtype=params["dtype"])
            shape = StepShape(chunks=(Chunk(params["prompt_len"]),) * params["batch"])
            yield Check(_name(row), cost.step(shape).seconds, result["first_token_ms"] * 1e-3)


def served_checks(
    machine: Machine,
    model: ModelConfig,
    requests: Sequence[TraceRequest],
    row: Mapping[str, Any],
    *,
    cold: bool = False,
) -> dict[str, Check]:
    """TTFT and TPOT of a row of `flexmoe bench serve`, by name: its requests, simulated on the engine that it tells of.

    cold: its server had computed no prompts of such lengths before. Means, and medians where the row has them.

    Raises ConfigError if the row was asked other requests, or some of its own were not answered.
    """
    engine, result = row["config"]["engine"], row["result"]
    plan = ParallelPlan.from_json({f.name: engine[f.name] for f in fields(ParallelPlan) if f.name in engine})
    setting = Setting.of(row["model"]["name"], model, machine, engine["dtype"], engine["quantization"])
    limits = SchedulerConfig(**{name: engine[name] for name in _LIMITS})
    if limits.max_num_batched_tokens == setting.step_tokens.widest:  # the engine's own choice, less beside streams
        limits = replace(limits, max_num_batched_tokens=None)
    told = EngineLimits(
        scheduler=limits, num_blocks=engine["kv_cache_blocks"], block_size=engine["block_size"],
        data_ranks=plan.data_parallel_size, prefix_caching=engine["prefix_caching"], tokens=setting.step_tokens,
        ahead=engine["prompts_ahead"], one_pass=engine.get("one_pass", False),
        serving=machine.serving, chunk_rate=usual_chunk_rate(machine.device.kind), beside=not machine.is_shared,
    )  # fmt: skip
    fit = [request for request in requests if request.input_len < told.longest]  # the server refuses the others
    if (len(requests), len(fit)) != (result["requests"], result["succeeded"]):
        raise ConfigError(
            f"of {len(requests)} requests {len(fit)} fit, but the row has {result['succeeded']} answers to "
            f"{result['requests']}; give the trace that it was asked, and a row without other failures."
        )
    steps = setting.steps(plan, limits, one_pass=told.one_pass)
    fleet = Fleet(told, Captures(steps).seconds if cold else steps.seconds, plan.num_ranks, 1, 1)
    served = simulate(fleet, fit).served
    pace = f"at {len(fit) / fit[-1].arrival:.3g} a second" if fit[-1].arrival else "at once"
    what = f"{setting.name}, {len(fit)} requests {pace}"
    what += "" if machine.serving else ", the engine alone"
    times = {
        "TTFT": ([one.ttft for one in served], result["ttft_ms"]),
        "TPOT": ([one.tpot for one in served if one.tpot is not None], result["tpot_ms"]),
    }
    kinds = (("", fmean, "mean"), (", median", median, "p50"))
    return {
        f"served {name}{kind}": Check(f"{what}: {name}{kind}", middle(predicted), measured[key] * 1e-3)
        for kind, middle, key in kinds for name, (predicted, measured) in times.items() if key in measured
    }  # fmt: skip


def _name(row: Mapping[str, Any]) -> str:
    params, how = row["params"], row["config"].get("strategy", "one process")
    lengths = f"{params['prompt_len']} + {params['output_len']} tokens"
    return f"{row['model']['label']}, {how}, batch {params['batch']}, {lengths}"
