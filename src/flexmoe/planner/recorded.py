"""What the step behind a recorded row had to read. Enters: a row, as JSON has it. Leaves: bytes, FLOPs, percentages.

Rows hold their floor where it was computed in their run, with the experts that were counted there. Of others it is told
by what they do hold: the model's name and what was changed in it, batch, lengths, format, devices. Which experts were
chosen is then no longer known: all are taken to be as likely. The definition is that of `planner/floor.py` in any case,
and devices read what a step needs together, each its even share.

A server's step is that of an average sequence among as many as ran together on average: by Little's law tokens a second
times seconds a token, at least one. A first token is held against the average prompt, alone on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flexmoe.config.engine import BUILTIN_NAME, LoadConfig
from flexmoe.config.model import ModelConfig
from flexmoe.models.hub import open_model
from flexmoe.models.presets import PRESETS
from flexmoe.planner.floor import expected_distinct, floor, mean_context, prompt_flops
from flexmoe.planner.operations import BITS

Row = Mapping[str, Any]

UNKNOWN_MODEL, UNKNOWN_MACHINE, NOT_COUNTED = REASONS = "unknown model", "unknown machine", "tokens not counted"
_TOLD = {"model", "parameters", "device", "dtype", "quantization"}
_DEGREES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


class NoFloorError(LookupError):
    """A row does not tell what its floor is made of. The message is one of REASONS."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one device: bytes a second of a plain stream, FLOPs a second of a large product."""

    read: float
    flops: float


@dataclass(frozen=True, slots=True)
class Needs:
    """What must be read and multiplied, by so many devices together. A step of decodes waits for its bytes alone."""

    bytes: int
    flops: int = 0
    devices: int = 1

    def seconds(self, speed: Speed) -> float:
        """At best."""
        return max(self.bytes / speed.read, self.flops / speed.flops) / self.devices


@dataclass(frozen=True, slots=True)
class Served:
    """What a server's clients had to wait for. sequences: that decoded together, on average."""

    sequences: float
    token: Needs
    first: Needs


def recorded_model(facts: Row) -> ModelConfig:
    """The model that a row names: a preset or the built-in one, with the layers and experts that the row tells.

    Raises NoFloorError for another, and where the parameters are not as many as the row says.
    """
    name = str(facts.get("name") or facts.get("label"))
    if name == BUILTIN_NAME:
        config = open_model(LoadConfig(load_format="dummy")).config
    elif name in PRESETS:
        config = PRESETS[name].config
    else:
        raise NoFloorError(UNKNOWN_MODEL)
    config = _changed(config, facts)
    if facts.get("parameters") not in (None, config.num_parameters()):
        raise NoFloorError(UNKNOWN_MODEL)
    return config


def step_needs(row: Row) -> Needs:
    """Of a decode step of `params.batch` rows, on `config.ranks` devices; ranks on a CPU share one memory.

    Raises NoFloorError.
    """
    config, params = recorded_model(row["model"]), row["params"]
    batch, context = params["batch"], mean_context(params["prompt_len"], params["output_len"])
    read = floor(config, batch, context, _itemsize(params["dtype"]), expected_distinct(config, batch))
    devices = row.get("config", {}).get("ranks", 1) if row["device"]["kind"] == "cuda" else 1
    return Needs(read.total, devices=devices)


def slice_needs(row: Row) -> Needs:
    """Of one rank's share of a MoE layer: the router, and of its experts, or of their slices, what was chosen."""
    hidden = recorded_model({"name": row["model"]}).hidden_size
    router = row["experts"] * hidden * _itemsize(row["dtype"])
    return Needs(round(router + row["weight_bytes"] * row["active_experts"] / row["slots"]))


def served_needs(row: Row, config: ModelConfig | None = None) -> Served:
    """Of the load of a row of `flexmoe bench serve`. config: of what was served; None: what the server named.

    Raises NoFloorError.
    """
    engine, result = row["config"].get("engine") or {}, row["result"]
    if not engine.keys() >= _TOLD:  # another's server, or an older one of ours
        raise NoFloorError(UNKNOWN_MODEL)
    config = config or recorded_model({"name": engine["model"], "parameters": engine["parameters"]})
    answers, prompts = result["succeeded"], result["prompt_tokens"]
    if not answers or not prompts or result["tokens_counted_by"] != "usage":
        raise NoFloorError(NOT_COUNTED)
    token_ms = (result["tpot_ms"] or {}).get("mean", 0.0)  # none where each answer was one token
    sequences = max(1.0, result["output_tokens_per_s"] * token_ms / 1e3)
    context = mean_context(prompts / answers, result["output_tokens"] / answers)
    computed = max(1, round((prompts - result["cached_tokens"]) / answers))
    itemsize, quantization = _itemsize(engine["dtype"]), engine["quantization"]
    token = floor(config, sequences, context, itemsize, expected_distinct(config, sequences), quantization)
    first = floor(config, 1, 0, itemsize, expected_distinct(config, computed), quantization)
    devices = math.prod(engine.get(name, 1) for name in _DEGREES) if str(engine["device"]).startswith("cuda") else 1
    flops = round(prompt_flops(config, 1, computed))
    return Served(sequences, Needs(token.total, devices=devices), Needs(first.total, flops, devices))


def served_floor(row: Row, speed: Speed | None, config: ModelConfig | None = None) -> dict[str, Any]:
    """What such a row's result says of its floor; or, where that cannot be told, `floor_unknown` and why.

    Percentages are of means, as the load is one.
    """
    try:
        needs = served_needs(row, config)
    except NoFloorError as error:
        return {"floor_unknown": str(error)}
    if speed is None:
        return {"floor_unknown": UNKNOWN_MACHINE}
    result = row["result"]
    found: dict[str, Any] = {"floor_sequences": round(needs.sequences, 2), "read_gb_s": round(speed.read / 1e9, 1)}
    for name, part, times in (("floor", needs.token, "tpot_ms"), ("first_token_floor", needs.first, "ttft_ms")):
        if result[times]:
            least = 1e3 * part.seconds(speed)
            found |= {
                f"{name}_ms": round(least, 4),
                f"percent_of_{name}": round(100 * least / result[times]["mean"], 2),
            }
    return found


def _changed(config: ModelConfig, facts: Row) -> ModelConfig:
    """With as many layers and experts, as wide, as the row tells; a token chooses no more experts than there are."""
    layers = config.layers[: facts.get("layers")]
    if config.moe is None or facts.get("experts") is None:
        return replace(config, layers=layers)
    told = {"num_experts": "experts", "top_k": "top_k", "expert_width": "expert_width"}
    changes = {ours: facts[theirs] for ours, theirs in told.items() if facts.get(theirs) is not None}
    changes["top_k"] = min(changes.get("top_k", config.moe.top_k), changes["num_experts"])
    return replace(config, layers=layers, moe=replace(config.moe, **changes))


def _itemsize(dtype: str) -> int:
    return int(BITS[dtype] // 8)
