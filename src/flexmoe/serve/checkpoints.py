"""Which model a FlexFlow name stands for. Enters: model_name and cache options. Leaves: where it is and what it is.

Weights are read from safetensors as they are: nothing is converted, and the cache is the Hugging Face hub's, in
`cache_path` (or FF_CACHE_PATH) if one is given. A local folder is used where it lies.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flexmoe.config.engine import LoadConfig
from flexmoe.config.model import ModelConfig
from flexmoe.errors import CheckpointError
from flexmoe.models import hub
from flexmoe.serve.errors import MissingModelError, WrongTypeError
from flexmoe.serve.types import ModelType

_DEFAULT_CACHE = "~/.cache/flexflow"  # where FlexFlow keeps weights in its own format, of no use here


@dataclass(frozen=True)
class Checkpoint:
    """A model found. options: what `flexmoe.LLM` needs to open it. config: its decoder. hf_config: its config.json."""

    options: Mapping[str, Any]
    config: ModelConfig
    hf_config: Mapping[str, Any]


class HFConfig(SimpleNamespace):
    """config.json as attributes, for scripts that read `llm.hf_config`."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def find(model_name: str, cache_path: str, refresh: bool) -> Checkpoint:
    """Find the model and read its configuration; weights are not touched.

    Raises MissingModelError (an OSError) if there is none, and UnsupportedModelError (a ValueError) for an
    architecture that FlexMoE lacks.
    """
    if not isinstance(model_name, str | os.PathLike):
        raise WrongTypeError(f"model_name={model_name!r} is not a string; give a folder or a Hugging Face hub id.")
    name = str(model_name)
    options: dict[str, Any] = {"model": name}
    folder = cache_folder(cache_path)
    if folder is not None:
        options["download_dir"] = str(folder)
    if refresh:
        options["force_download"] = True
    try:
        source = hub.open_model(LoadConfig(**options, load_format="dummy"))
    except CheckpointError as error:
        raise MissingModelError(str(error)) from error
    return Checkpoint(options, source.config, source.hf_config)


def fetch(checkpoint: Checkpoint) -> Path:
    """The model's folder with its weights, downloaded if they are not there."""
    return hub.resolve(LoadConfig(**checkpoint.options))


def cache_folder(cache_path: str) -> Path | None:
    """The hub's cache for this model; None is the one of huggingface-hub (HF_HOME).

    FlexFlow's own default, spelt out in many scripts, says nothing about where downloads should go.
    """
    path = cache_path or os.environ.get("FF_CACHE_PATH", "")
    if not path or path.rstrip("/") == _DEFAULT_CACHE:
        return None
    return Path(path).expanduser() / "hub"


def shown_cache_path(cache_path: str) -> str:
    """What `llm.cache_path` says."""
    return cache_path or os.environ.get("FF_CACHE_PATH", "") or _DEFAULT_CACHE


def model_type(config: ModelConfig) -> ModelType:
    """FlexFlow's family of the model."""
    return ModelType.LLAMA if config.moe is None else ModelType.MOE
