"""What Hugging Face transformers says. Enters: a model folder and prompts. Leaves: plain tensors and token ids.

The model is loaded, asked and freed before the engine starts, so that the weights exist once in memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoe.errors import ConfigError, MissingDependencyError
from flexmoe.verify.prompts import Prompts
from flexmoe.verify.recording import Recording


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt. tokens: what greedy decoding adds; logits [N, V]: each was chosen from.

    recording: one forward pass over `sequence`, the prompt and all but the last of those tokens.
    """

    prompt: tuple[int, ...]
    recording: Recording
    tokens: tuple[int, ...]
    logits: Tensor

    @property
    def sequence(self) -> tuple[int, ...]:
        return self.prompt + self.tokens[:-1]


@dataclass(frozen=True, slots=True)
class Reference:
    """encoded: the prompts' texts by the model's own tokenizer. eos_token_ids: what ends its text."""

    version: str
    answers: tuple[Answer, ...]
    encoded: tuple[tuple[int, ...], ...]
    eos_token_ids: frozenset[int]


def import_transformers() -> Any:
    """The package. Raises MissingDependencyError where it is absent, ConfigError where it does not work."""
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise ConfigError(f"transformers is installed, but lacks a package of its own: {error}.") from error
        raise MissingDependencyError("transformers", "hf", "comparing with Hugging Face") from error
    except ImportError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"transformers is installed, but cannot be imported: {reason}") from error


def ask_transformers(folder: Path, prompts: Prompts, dtype: torch.dtype, device: torch.device) -> Reference:
    """Load the folder's model in `dtype` and run every prompt through it, each alone."""
    transformers = import_transformers()
    with _quiet(transformers):
        encoded = _encode(transformers, folder, prompts.texts)
        # "eager" is the definition that the other implementations are optimisations of.
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", local_files_only=True
        )
        model = model.to(device).eval()
        eos = _as_ids(model.generation_config.eos_token_id)
        answers = tuple(_answer(transformers, model, ids, prompts.max_tokens) for ids in prompts.token_ids)
    return Reference(transformers.__version__, answers, encoded, eos)


def _encode(transformers: Any, folder: Path, texts: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tuple(tuple(tokenizer(text)["input_ids"]) for text in texts)


@torch.inference_mode()
def _answer(transformers: Any, model: Any, prompt: tuple[int, ...], max_tokens: int) -> Answer:
    ids = torch.tensor([prompt], device=model.device)
    # Replaced and not passed along: generate() would fill what is unset from the model's own, stops and penalties too.
    model.generation_config = transformers.GenerationConfig(do_sample=False)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        return_dict_in_generate=True,
        output_logits=True,
    )
    recording = Recording()
    with _recorded(model, recording):
        recording.record("logits", -1, model(out.sequences[:, :-1], use_cache=False).logits)
    tokens = tuple(out.sequences[0, len(prompt) :].tolist())
    return Answer(prompt, recording, tokens, torch.cat(out.logits).float().cpu())


@contextmanager
def _recorded(model: Any, recording: Recording) -> Iterator[None]:
    """Write each stage's output to `recording` while the context is open."""
    handles = [_watch(model.get_input_embeddings(), recording, "embedding", -1)]
    for index, layer in enumerate(model.base_model.layers):
        is_moe = hasattr(layer.mlp, "experts")
        handles.append(_watch(layer.self_attn, recording, "attention", index))
        handles.append(_watch(layer.mlp, recording, "moe" if is_moe else "mlp", index))
        handles.append(_watch(layer, recording, "layer", index))
        if is_moe:
            handles.append(_watch_router(layer.mlp.gate, recording, index))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(module: nn.Module, recording: Recording, stage: str, layer: int) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        recording.record(stage, layer, output[0] if isinstance(output, tuple) else output)

    return module.register_forward_hook(hook)


def _watch_router(router: Any, recording: Recording, layer: int) -> Any:
    """Its choice [T, K], the weights [T, K] and the logits [T, E], which it returns before or after their softmax."""

    def hook(_module: nn.Module, args: Any, output: Any) -> None:
        _, weights, ids = output
        x = args[0].reshape(-1, router.weight.shape[1])
        recording.record("topk_ids", layer, ids)
        recording.record("topk_weights", layer, weights)
        recording.record("router_logits", layer, F.linear(x, router.weight))

    return router.register_forward_hook(hook)


def _as_ids(value: Any) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep its notes and progress bars out of our output."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
