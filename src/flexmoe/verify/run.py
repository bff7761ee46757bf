"""verify(): one model against Hugging Face transformers. Enters: a model and options. Leaves: a Report."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import flexmoe
from flexmoe.config.engine import LoadConfig
from flexmoe.config.model import ModelConfig
from flexmoe.engine.device import choose_device, set_threads
from flexmoe.engine.tokenizer import Tokenizer
from flexmoe.errors import CheckpointError, ConfigError
from flexmoe.llm import LLM
from flexmoe.models.hub import open_model
from flexmoe.verify.layers import check_layers
from flexmoe.verify.prompts import Prompts, choose_prompts
from flexmoe.verify.reference import Reference, ask_transformers, import_transformers
from flexmoe.verify.report import Check, Report
from flexmoe.verify.scenarios import Scenarios, blocks_for
from flexmoe.verify.tolerance import TOLERANCES

_BLOCK_SIZE = 16
_SHORT = 2048  # tokens of all prompts and answers together up to which the cache may hold twenty of each


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """model: a folder, a hub id, or None for the built-in one. prompts: texts; empty for a default set.

    max_tokens: how many greedy tokens are compared for each prompt.
    """

    model: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    revision: str | None = None
    expert_backend: str = "auto"
    prompts: tuple[str, ...] = ()
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if self.dtype not in TOLERANCES:
            raise ConfigError(f"dtype={self.dtype!r} has no stated tolerances; use one of {', '.join(TOLERANCES)}.")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} is not a positive integer.")


def verify(
    options: VerifyOptions, *, reference: Reference | None = None, notify: Callable[[str], None] = lambda _: None
) -> Report:
    """Compare the engine with transformers on one model.

    reference: what transformers said before, to compare other weights or options with; notify: hears of each stage.
    Raises MissingDependencyError without transformers, and what `LLM` raises for a model that cannot be served.
    """
    import_transformers()
    _, config, prompts = _prepare(options)
    if reference is None:
        notify("transformers: loading and running")
        reference = make_reference(options)
    notify("flexmoe: loading and running")
    with LLM(options.model, **_engine_options(options, prompts)) as llm:
        checks = _checks(llm, prompts, reference, options)
        facts = {
            "model": llm.describe()["model"],
            "architecture": config.architecture,
            "parameters": config.num_parameters(),
            **{
                name: llm.describe()[name]
                for name in ("device", "dtype", "threads", "expert_backend", "decode_kernels")
            },
            "prompt_tokens": [len(ids) for ids in prompts.token_ids],
            "max_tokens": prompts.max_tokens,
            "versions": {
                "flexmoe": flexmoe.__version__,
                "torch": torch.__version__,
                "transformers": reference.version,
            },
        }
    return Report(facts, checks)


def make_reference(options: VerifyOptions) -> Reference:
    """What transformers says about the model; its weights are freed again."""
    folder, _, prompts = _prepare(options)
    set_threads(options.threads)
    dtype: torch.dtype = getattr(torch, options.dtype)
    reference = ask_transformers(folder, prompts, dtype, choose_device(options.device))
    gc.collect()  # modules form cycles: without this the weights could stay beside the engine's
    return reference


def _prepare(options: VerifyOptions) -> tuple[Path, ModelConfig, Prompts]:
    source = open_model(LoadConfig(model=options.model, revision=options.revision))
    if source.folder is None:
        raise CheckpointError(f"{source.name!r} has no weights to verify; give a model's folder or hub id.")
    if source.packing is not None:
        raise ConfigError(
            f"{source.name} holds {source.packing.quantization} weights, which transformers cannot read; compare it "
            f"with the model that it was made from: flexmoe verify MODEL --quantization {source.name}."
        )
    tokenizer = Tokenizer.from_folder(source.folder)
    return source.folder, source.config, choose_prompts(source.config, tokenizer, options.prompts, options.max_tokens)


def _engine_options(options: VerifyOptions, prompts: Prompts) -> dict[str, object]:
    """An engine whose cache holds all prompts and answers several times over, unless they are very long."""
    size = _BLOCK_SIZE
    while size > 1 and size >= prompts.longest:  # a prompt must fill a block to be found in the prefix cache
        size //= 2
    blocks = sum(blocks_for(len(ids) + prompts.max_tokens, size) + 1 for ids in prompts.token_ids)
    copies = 20 if blocks * size <= _SHORT else 2
    return {
        "dtype": options.dtype,
        "device": options.device,
        "threads": options.threads,
        "revision": options.revision,
        "expert_backend": options.expert_backend,
        "block_size": size,
        "num_blocks": copies * blocks,
    }


def _checks(llm: LLM, prompts: Prompts, reference: Reference, options: VerifyOptions) -> Sequence[Check]:
    tolerance = TOLERANCES[options.dtype]
    answers = reference.answers
    checks = [_check_eos(llm.config, reference), _check_encoding(llm, prompts, reference)]
    checks += check_layers(llm, answers, tolerance)
    checks += Scenarios(llm, answers, tolerance).run()
    return checks


def _check_eos(config: ModelConfig, reference: Reference) -> Check:
    ours, theirs = frozenset(config.eos_token_ids), reference.eos_token_ids
    same = ours == theirs
    detail = "" if same else f"{sorted(ours)} instead of {sorted(theirs)}"
    return Check("end of sequence", "pass" if same else "fail", f"{len(ours)} ids", "same", detail)


def _check_encoding(llm: LLM, prompts: Prompts, reference: Reference) -> Check:
    found = zip(prompts.texts, reference.encoded, strict=True)
    wrong = [number for number, (text, ids) in enumerate(found) if tuple(llm.encode(text)) != ids]
    figure = f"{len(prompts.texts) - len(wrong)} of {len(prompts.texts)} prompts"
    detail = f"prompts {', '.join(map(str, wrong))} differ" if wrong else ""
    return Check("tokenizer", "fail" if wrong else "pass", figure, "all", detail)
