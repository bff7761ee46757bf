"""Where a model is: built in, a folder, a preset, or a repository of the Hugging Face hub. Leaves: a ModelSource.

Downloads go through huggingface-hub and its cache (HF_HOME, or download_dir); a repository that is cached opens
without a network.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexmoe.config.engine import BUILTIN_NAME, LoadConfig
from flexmoe.config.model import ModelConfig
from flexmoe.config.packing import KEY, Packing
from flexmoe.errors import CheckpointError, ConfigError
from flexmoe.models import checkpoint, families
from flexmoe.models.checkpoint import Match
from flexmoe.models.presets import PRESETS

_BUILTIN = Path(__file__).parents[1] / "assets" / "builtin"
# Everything but weights: configuration, tokenizer, chat template.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = ("*.safetensors",)
# Second copies of the weights in the publisher's own format.
_NEVER = ("consolidated*", "original/*", "onnx/*", "*.index.json.bak")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model found, its configuration read and its weights' headers checked.

    folder: None for a preset, which has no files. matches: each stored tensor and its place; empty for dummy weights.
    packing: how its weights are quantized; None: they are full.
    """

    name: str
    folder: Path | None
    hf_config: Mapping[str, Any]
    config: ModelConfig
    matches: tuple[Match, ...] = ()
    packing: Packing | None = None


def open_model(load: LoadConfig) -> ModelSource:
    """Find the model, read its configuration and, unless the weights are to be dummies, check its files.

    Only headers are read, so that a bad checkpoint is refused before memory is taken for it. Errors: CheckpointError
    if there is no such model or its files do not fill it, ConfigError for a malformed config.json,
    UnsupportedModelError for a decoder or feature that is not there.
    """
    name = BUILTIN_NAME if load.model is None else load.model
    preset = PRESETS.get(name)
    if preset is not None and not Path(name).is_dir():
        if load.load_format != "dummy":
            raise CheckpointError(
                f"{name!r} is a preset: a configuration without weights. Give load_format='dummy' for random weights "
                f"(--load-format dummy), or the model {preset.hub_id!r} for the published ones."
            )
        return ModelSource(name, None, preset.hf_config, preset.config)
    folder = resolve(load)
    hf_config = _read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    packing = Packing.read(hf_config)
    described = hf_config if packing is None else {key: value for key, value in hf_config.items() if key != KEY}
    config = families.read_config(described, _read_json(generation) if generation.is_file() else None)
    if load.load_format == "dummy":
        return ModelSource(name, folder, hf_config, config, packing=packing)
    stored = checkpoint.open_checkpoint(folder)
    matches = checkpoint.validate(stored, config, packing)
    if packing is None and stored.dtype is not None and not (hf_config.get("dtype") or hf_config.get("torch_dtype")):
        config = replace(config, checkpoint_dtype=stored.dtype)
    return ModelSource(name, folder, hf_config, config, matches, packing)


def resolve(load: LoadConfig) -> Path:
    """The folder of the model: built in for None, a local one if it exists, else from the hub.

    Errors: CheckpointError that says what the name was taken for and what to do.
    """
    if load.model is None:
        if not (_BUILTIN / "config.json").is_file():
            raise CheckpointError(
                f"this installation lacks its built-in model ({_BUILTIN}); give a folder or a hub id."
            )
        return _BUILTIN
    if not load.model.strip():
        raise CheckpointError("model is an empty name; give a folder, a hub id, or builtin.")
    path = Path(load.model).expanduser()
    if path.is_file():
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json and *.safetensors.")
    if path.is_dir():
        return _checked(path)
    if _looks_like_path(load.model):
        raise CheckpointError(f"the folder {path} does not exist (a hub id would look like 'organisation/name').")
    return _checked(_download(load.model, load))


def _checked(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder
    if not checkpoint.has_weights(folder):
        raise CheckpointError(f"{folder} has no config.json, and {checkpoint.explain_no_safetensors(folder)}")
    raise CheckpointError(
        f"{folder} has no config.json, which says how the weights are put together; copy it from where they came from."
    )


def _looks_like_path(model: str) -> bool:
    """A hub id is `name` or `organisation/name`."""
    return model.startswith((".", "/", "~")) or "\\" in model or model.count("/") > 1 or model.endswith("/")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}.") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is not a configuration: it is nested too deeply.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error.msg}, line {error.lineno}, column {error.colno}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return value


def _download(model: str, load: LoadConfig) -> Path:
    """The repository's files in the hub's cache; those alone if the network fails."""
    # Imported here: it takes a fifth of a second that a local folder need not pay.
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs | ({} if load.progress else {"disable": True}))  # type: ignore[no-untyped-call]

    try:
        folder = snapshot_download(
            model,
            revision=load.revision,
            cache_dir=load.download_dir,
            force_download=load.force_download,
            allow_patterns=[*SMALL_FILES, *(() if load.load_format == "dummy" else _WEIGHTS)],
            ignore_patterns=list(_NEVER),
            tqdm_class=Bar,
        )
    except errors.HFValidationError as error:
        raise CheckpointError(f"no folder {model!r} exists, and it is no hub id either: {error}") from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # httpx's, of whichever version
        raise CheckpointError(
            f"no folder {model!r} exists, so it was taken for a Hugging Face hub id; "
            f"{_why(model, load, error)}{_other_names(model, load)}"
        ) from error
    return Path(folder)


def _other_names(model: str, load: LoadConfig) -> str:
    """Names known here that may have been meant."""
    near = difflib.get_close_matches(model, [BUILTIN_NAME, *PRESETS], n=1)
    presets = f" Presets: {', '.join(PRESETS)}." if load.load_format == "dummy" else ""
    return presets + (f" Did you mean {near[0]!r}?" if near else "")


def _why(model: str, load: LoadConfig, error: Exception) -> str:
    """The reason a download failed, and the remedy."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"the model is gated: accept its terms on https://huggingface.co/{model}, then run `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model, or it is private: then run `hf auth login`."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the model has no revision {load.revision!r}."
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            "the hub cannot be reached and the cache does not hold all of the model. Download it where there is a "
            f"network (`hf download {model}`) and give that folder, or use the built-in model (`builtin`)."
        )
    return f"the download failed: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}"
