"""What is measured: a model as it is, or a preset cut to size. Leaves: a folder that every engine can open.

A preset has no files, and one with fewer layers or more experts exists nowhere: its config.json is written to a
temporary folder, from which our engine and others read the same.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmoe.config.engine import LoadConfig
from flexmoe.config.model import ModelConfig
from flexmoe.errors import ConfigError
from flexmoe.models.families import read_config
from flexmoe.models.hub import ModelSource, open_model
from flexmoe.models.presets import PRESETS


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What differs from the model's own config.json; None: nothing."""

    layers: int | None = None
    experts: int | None = None
    top_k: int | None = None
    expert_width: int | None = None

    def __bool__(self) -> bool:
        return self != Changes()

    def label(self, name: str, config: ModelConfig) -> str:
        """The name of the changed model, e.g. "mixtral-8x7b with 8 of 32 layers". config: before the changes."""
        words = [] if self.layers is None else [f"{self.layers} of {config.num_layers} layers"]
        words += [] if self.experts is None else [f"{self.experts} experts"]
        words += [] if self.top_k is None else [f"top-{self.top_k}"]
        words += [] if self.expert_width is None else [f"experts {self.expert_width} wide"]
        return f"{name} with {', '.join(words)}" if words else name


@dataclass(frozen=True, slots=True)
class Subject:
    """folder: holds config.json, and weights unless load_format is "dummy". label: the name, with what was changed."""

    name: str
    label: str
    folder: Path
    load_format: str
    config: ModelConfig

    def facts(self) -> dict[str, Any]:
        """What a row says of it."""
        config, moe = self.config, self.config.moe
        return {
            "name": self.name,
            "label": self.label,
            "architecture": config.architecture,
            "load_format": self.load_format,
            "parameters": config.num_parameters(),
            "active_parameters": config.num_active_parameters(),
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "experts": moe.num_experts if moe else None,
            "top_k": moe.top_k if moe else None,
            "expert_width": moe.expert_width if moe else None,
        }


@contextmanager
def open_subject(model: str | None, load_format: str = "auto", changes: Changes | None = None) -> Iterator[Subject]:
    """The model, for as long as the context is open. A preset has random weights without being asked.

    Raises ConfigError if the configuration of a model with weights is to be changed, or to have more layers than it
    has, and what `open_model` raises.
    """
    changes = changes or Changes()
    if model in PRESETS and not Path(str(model)).is_dir():
        load_format = "dummy"
    if changes and load_format != "dummy":
        raise ConfigError("changes of a model fit no stored weights; give a preset, or load_format='dummy'.")
    source = open_model(LoadConfig(model=model, load_format=load_format))
    if (changes.layers or 0) > source.config.num_layers:
        raise ConfigError(f"layers={changes.layers} is above the model's {source.config.num_layers}; use fewer.")
    if source.folder is not None and not changes:
        yield Subject(source.name, source.name, source.folder, load_format, source.config)
        return
    with tempfile.TemporaryDirectory(prefix="flexmoe-bench-") as folder:
        yield _written(source, changes, Path(folder))


def _written(source: ModelSource, changes: Changes, folder: Path) -> Subject:
    hf_config = _changed(source.hf_config, changes)
    config = read_config(hf_config)
    (folder / "config.json").write_text(json.dumps(hf_config, indent=2), encoding="utf-8")
    return Subject(source.name, changes.label(source.name, source.config), folder, "dummy", config)


def _changed(hf_config: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """A config.json with the changes in whichever spelling it uses."""
    changed = dict(hf_config)
    if changes.layers is not None:
        changed["num_hidden_layers"] = changes.layers
        if changed.get("layer_types"):
            changed["layer_types"] = list(changed["layer_types"])[: changes.layers]
    for name in {"num_experts", "num_local_experts"} & changed.keys() if changes.experts is not None else ():
        changed[name] = changes.experts
    if changes.top_k is not None:
        changed["num_experts_per_tok"] = changes.top_k
    if changes.expert_width is not None:
        changed["moe_intermediate_size" if "moe_intermediate_size" in changed else "intermediate_size"] = (
            changes.expert_width
        )
    return changed
