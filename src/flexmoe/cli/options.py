"""Options that several commands share. Enters: words of the command line. Leaves: options of `LLM`, SamplingParams."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from flexmoe.config.engine import (
    CPU_SEATS,
    DTYPES,
    EXPERT_BACKENDS,
    ISAS,
    LAUNCHERS,
    LOAD_FORMATS,
    MAX_ROWS,
    QUANTIZATIONS,
    CacheConfig,
    DeviceConfig,
    LaunchConfig,
    LoadConfig,
    SchedulerConfig,
)
from flexmoe.config.plan import DEGREES, MOE_DISPATCH
from flexmoe.config.sampling import SamplingParams

Function = Callable[..., Any]

DEBUG = "flexmoe.debug"  # key in the context's meta, which all commands share

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def byte_size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """A number of bytes, with a unit if wanted: 1073741824, 1GiB, 500M."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", value.upper())
    if match is None or match[2] not in _UNITS:
        raise click.BadParameter(f"{value!r} is not a number of bytes; use 1073741824, 1GiB or 500MB.")
    return int(float(match[1]) * _UNITS[match[2]])


def numbers(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    """Positive integers with commas between them; each once, in the order given."""
    words = [word.strip() for word in value.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise click.BadParameter(f"{value!r} is not a list of positive integers; use for instance 1,8,32.")
    return tuple(dict.fromkeys(map(int, words)))


def _plan(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """`auto`, or a file that is there."""
    if value not in (None, "auto") and not Path(value).is_file():
        raise click.BadParameter(f"{value!r} is neither auto nor a file.")
    return value


def _default(part: type, name: str) -> Any:
    return next(field.default for field in fields(part) if field.name == name)


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    """Accepted before and after the command's name."""
    if value:
        ctx.meta[DEBUG] = True
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Print logs, and the traceback of an error."
)

_positive = click.IntRange(min=1)

# Shown defaults are the engine's own; an option that is not given is not passed on.
_MODEL_OPTIONS = (
    click.option("-m", "--model", help="A model's folder or its name on the Hugging Face Hub.  [default: builtin]"),
    click.option("--revision", help="Branch, tag or commit of a model on the Hub."),
    click.option(
        "--load-format",
        type=click.Choice(LOAD_FORMATS),
        help=f"`dummy`: random weights from config.json alone.  [default: {_default(LoadConfig, 'load_format')}]",
    ),
    click.option(
        "--dtype", type=click.Choice(DTYPES), help=f"Number format.  [default: {_default(DeviceConfig, 'dtype')}]"
    ),
    click.option(
        "--quantization", type=click.Choice(QUANTIZATIONS), help="Hold weights in few bits, on a CPU.  [default: none]"
    ),
    click.option("--device", help=f"cpu, cuda or cuda:N.  [default: {_default(DeviceConfig, 'device')}]"),
    click.option("--threads", type=_positive, help="Threads on a CPU.  [default: one a physical core]"),
    click.option(
        "--expert-backend",
        type=click.Choice(EXPERT_BACKENDS),
        help=f"How experts are computed.  [default: {_default(DeviceConfig, 'expert_backend')}]",
    ),
    click.option(
        "--isa",
        type=click.Choice(ISAS),
        help=f"Instruction set of the C kernels on a CPU.  [default: {_default(DeviceConfig, 'isa')}]",
    ),
    click.option(
        "--max-model-len", type=_positive, help="Prompt and answer together, in tokens.  [default: the model's]"
    ),
    click.option(
        "--max-num-seqs",
        type=_positive,
        help=f"Requests that run together.  [default: {MAX_ROWS} on a GPU, {CPU_SEATS} on a CPU]",
    ),
    click.option(
        "--max-num-batched-tokens",
        type=_positive,
        help="Tokens computed together.  [default: what pays on the device, 2048 to 8192]",
    ),
    click.option(
        "--max-decode-slowdown",
        type=float,
        help="How much longer a step may take for prompts computed beside streamed answers, as a factor.  "
        f"[default: {_default(SchedulerConfig, 'max_decode_slowdown')}]",
    ),
    click.option(
        "--one-pass",
        is_flag=True,
        default=None,
        help="Compute decodes beside prompts in one pass over the weights: quicker on a GPU, but in bf16 a request's "
        "tokens may then depend on what else is computed.",
    ),
    click.option(
        "--prompts-ahead/--no-prompts-ahead",
        default=None,
        help="On one GPU, launch steps with prompts, too, before the tokens of the step before are known: more tokens "
        "a second where many requests wait.  [default: prompts-ahead]",
    ),
    click.option(
        "--compile-ahead/--no-compile-ahead",
        default=None,
        help="On one GPU, compile kernels that later steps may need in the background, from the start on, and record "
        "their graphs while a server has nothing to do; else each when it is needed first.  [default: compile-ahead]",
    ),
    click.option(
        "--kv-cache-memory",
        metavar="BYTES",
        callback=byte_size,
        help="Memory for keys and values, e.g. 2GiB.  [default: as needed]",
    ),
    click.option(
        "--block-size",
        type=_positive,
        help=f"Tokens in a block of that memory.  [default: {_default(CacheConfig, 'block_size')}]",
    ),
    click.option("--seed", type=int, help="Seed of the samples, and of dummy weights.  [default: 0]"),
    click.option("--tensor-parallel-size", type=_positive, help="Processes that share each layer.  [default: 1]"),
    click.option(
        "--expert-parallel-size", type=_positive, help="Over how many of them whole experts are spread.  [default: 1]"
    ),
    click.option(
        "--pipeline-parallel-size", type=_positive, help="Stages of layers, each in processes of its own.  [default: 1]"
    ),
    click.option(
        "--data-parallel-size", type=_positive, help="Groups of processes with requests of their own.  [default: 1]"
    ),
    click.option(
        "--moe-dispatch",
        type=click.Choice(MOE_DISPATCH),
        help="Add the ranks' results, or send tokens to their experts.  [default: auto]",
    ),
    click.option(
        "--plan",
        metavar="auto|FILE",
        callback=_plan,
        help="A plan as a JSON file, for all these; `auto`: the best for the machine, as `flexmoe plan` finds it.",
    ),
    click.option(
        "--machine",
        metavar="NAME|FILE",
        help="What it runs on: for `--plan auto`, and to compare steps with their prediction.",
    ),
    click.option("--workload", type=click.Path(exists=True, dir_okay=False), help="File of what `--plan auto` is for."),
    click.option(
        "--launcher",
        type=click.Choice(LAUNCHERS),
        help=f"Who starts the processes; `ray`: on many machines.  [default: {_default(LaunchConfig, 'launcher')}]",
    ),
    debug_option,
)

_MODEL_NAMES = (
    "model",
    "revision",
    "load_format",
    "dtype",
    "quantization",
    "device",
    "threads",
    "expert_backend",
    "isa",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_decode_slowdown",
    "one_pass",
    "prompts_ahead",
    "compile_ahead",
    "kv_cache_memory",
    "block_size",
    "seed",
    *DEGREES,
    "moe_dispatch",
    "plan",
    "machine",
    "workload",
    "launcher",
)


def model_options(function: Function) -> Function:
    """Give a command the options of a model; it gets those that were used as one mapping, `llm_options`."""
    return _collected(function, "llm_options", _MODEL_NAMES, _MODEL_OPTIONS)


def sampling_options(*, temperature: float, max_tokens: int) -> Callable[[Function], Function]:
    """Give a command the options of sampling with its own defaults; it gets them as `sampling`, SamplingParams."""
    options = (
        click.option("--max-tokens", type=_positive, default=max_tokens, show_default=True, help="New tokens at most."),
        click.option(
            "-t",
            "--temperature",
            type=float,
            default=temperature,
            show_default=True,
            help="0: always the most likely token; the higher, the more surprising.",
        ),
        click.option("--top-p", type=float, help="Choose among the likeliest tokens that reach this probability."),
        click.option("--top-k", type=int, help="Choose among this many tokens at most."),
        click.option("--min-p", type=float, help="Leave out tokens this much less likely than the likeliest."),
        click.option("--repetition-penalty", type=float, help="Above 1: avoid tokens seen before."),
        click.option("--stop", multiple=True, help="End before this text; may be given several times."),
    )
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop")

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def wrapper(*args: Any, sampling: dict[str, Any], **kwargs: Any) -> Any:
            return function(*args, sampling=SamplingParams.from_options(sampling), **kwargs)

        return _collected(wrapper, "sampling", names, options)

    return decorate


def _collected(function: Function, target: str, names: tuple[str, ...], options: tuple[Function, ...]) -> Function:
    """Add click options to a function, which gets the values given as one mapping called `target`."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        values = {name: kwargs.pop(name) for name in names}
        return function(*args, **{target: {n: v for n, v in values.items() if v is not None}}, **kwargs)

    for option in reversed(options):
        wrapper = option(wrapper)
    return wrapper
