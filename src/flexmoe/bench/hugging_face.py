"""Hugging Face transformers on the weights of our engine: no second copy, and the same numbers to compute with.

Enters: config.json and our parameters by name. Leaves: generate()'s tokens in any of its configurations. Its model is
made without memory and its parameters replaced by views of ours; `models.families` says which part is whose.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.config.model import ModelConfig
from flexmoe.errors import ConfigError, MissingDependencyError
from flexmoe.models import families
from flexmoe.models.families.layout import Piece

Prompts = Sequence[list[int]]


@dataclass(frozen=True, slots=True)
class Setup:
    """One configuration of generate().

    experts: its implementation; None is the library's default, which decodes with batched_mm on a GPU. compiled: the
    mode of torch.compile for decoding, which needs the static cache.
    """

    experts: str | None = None
    cache: str = "dynamic"
    compiled: str | None = None

    def __str__(self) -> str:
        experts = f"{self.experts} experts" if self.experts else ""
        compiled = f"torch.compile {self.compiled}" if self.compiled else ""
        return ", ".join(filter(None, (experts, f"{self.cache} cache", compiled)))


DEFAULT = Setup()
_GRAPHS, _TUNED = "reduce-overhead", "max-autotune"


def candidates(config: ModelConfig, batch: int, device: torch.device) -> list[Setup]:
    """Configurations worth trying, the likeliest best first.

    For one row a compiled step in one CUDA graph is. For more, gathering each row's experts, which is what can be
    compiled, copies them once a row: a loop over the experts that were hit may win. On a CPU compiling takes minutes.
    """
    plain = [Setup("grouped_mm"), Setup("eager"), Setup("batched_mm")]
    tuned, graphs = Setup("batched_mm", "static", _TUNED), Setup("batched_mm", "static", _GRAPHS)
    if device.type == "cpu":
        found = [*plain, Setup("grouped_mm", "static"), Setup("batched_mm", "static", "default")]
    elif batch == 1:
        found = [tuned, *plain, graphs]
    else:
        found = [*plain, Setup("eager", "static"), graphs, tuned]
    if config.moe is None:
        found = [replace(setup, experts=None) for setup in found]
    return list(dict.fromkeys(found))


class HuggingFace:
    """A transformers model that reads our weights where they are."""

    def __init__(self, folder: Path, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        """Raises MissingDependencyError without transformers, ConfigError if its model needs what ours has not."""
        self._transformers = import_transformers()
        self._transformers.utils.logging.set_verbosity_error()
        self._model = _build(self._transformers, folder, config, weights)
        self._cache: tuple[int, int, Any] | None = None  # batch, length, StaticCache
        self.setup = DEFAULT
        self._has_experts = config.moe is not None
        self._usual = self._model.config._experts_implementation

    def use(self, setup: Setup) -> None:
        """Change to another configuration, and let go of what the former compiled and cached."""
        if self.setup.compiled:
            torch._dynamo.reset()
            self._model.__dict__.pop("_compiled_call", None)
        self.setup, self._cache = setup, None
        gc.collect()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._has_experts:
            self._model.set_experts_implementation(setup.experts or self._usual)

    def about(self) -> dict[str, Any]:
        config = self._model.config
        return {
            "attention": config._attn_implementation,
            "experts": config._experts_implementation if self._has_experts else None,
            "cache": self.setup.cache,
            "compiled": self.setup.compiled,
            "description": str(self.setup),
        }

    def generate(self, prompts: Prompts, count: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=self._model.device)  # [B, prompt]
        options = self._options(len(prompts), ids.shape[1] + count)
        out = self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)
        answers: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return answers

    def reserve(self, batch: int, length: int) -> None:
        """Make a static cache for so many tokens, used again and again: compiled code is bound to its place."""
        if self.setup.cache == "static":
            cache = self._transformers.StaticCache(config=self._model.config, max_cache_len=length)
            self._cache = (batch, length, cache)

    def _options(self, batch: int, length: int) -> dict[str, Any]:
        options: dict[str, Any] = {}
        if self.setup.cache == "static":
            if self._cache is None or self._cache[0] != batch or self._cache[1] < length:
                self.reserve(batch, length)
            assert self._cache is not None
            self._cache[2].reset()
            options["past_key_values"] = self._cache[2]
        if self.setup.compiled:
            config = self._transformers.CompileConfig(mode=self.setup.compiled, dynamic=False)
            config._compile_all_devices = True  # on a CPU generate() does not compile otherwise
            options["compile_config"] = config
        else:
            options["disable_compile"] = True
        return options


def import_transformers() -> Any:
    """The package. Raises MissingDependencyError where it is absent."""
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise MissingDependencyError("transformers", "hf", "measuring Hugging Face") from error


def _build(transformers: Any, folder: Path, config: ModelConfig, weights: Mapping[str, Tensor]) -> Any:
    embedding = weights["embed_tokens.weight"]
    hf_config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf_config, dtype=embedding.dtype)
    _share(model, config, weights)
    _restore_buffers(model, embedding.device)
    missing = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if missing:
        raise ConfigError(f"transformers {transformers.__version__} has tensors that are not ours: {missing[:5]}.")
    # Replaced and not passed along: generate() would fill what is unset from the model's own, stops and penalties too.
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)
    return model.eval()


def _share(model: Any, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Make each parameter a view of ours; only one in another dtype, the router in fp32, becomes a copy."""
    pieces = families.tensors(config)
    for name, parameter in list(model.named_parameters()):
        piece = pieces.get(name)
        if piece is None:
            continue
        owner, _, own_name = name.rpartition(".")
        view = _view(weights[piece.param], piece).to(parameter.dtype)
        assert view.shape == parameter.shape, name
        setattr(model.get_submodule(owner), own_name, nn.Parameter(view, requires_grad=False))
    model.tie_weights()


def _view(whole: Tensor, piece: Piece) -> Tensor:
    """The rows of our parameter that one of theirs holds."""
    if piece.fused:
        return whole
    rows = whole if piece.expert is None else whole[piece.expert]
    return rows[piece.start : piece.start + piece.shape[0]]


def _restore_buffers(model: nn.Module, device: torch.device) -> None:
    """Make modules with buffers of their own anew: rotary embeddings, whose frequencies come from the configuration."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            owner, _, own_name = name.rpartition(".")
            fresh = type(module)(module.config).to(device)
            setattr(model.get_submodule(owner), own_name, fresh)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
