"""What commands say about a model and its speed, and how text reaches a terminal. All notes go to stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from flexmoe.engine.outputs import RequestOutput
    from flexmoe.llm import LLM

# Control characters but tab and line feed: a model must not move the cursor, colour the screen or ring the bell.
_CONTROL = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\t\n"}


def open_llm(llm_options: Mapping[str, Any], *, quiet: bool = False) -> LLM:
    """Load the model and say what it runs with. The import of torch is part of the wait, hence the notice before."""
    show = not quiet and sys.stderr.isatty()
    notice = f"Loading {llm_options.get('model') or 'the built-in model'} ..."
    if show:
        click.echo(click.style(notice, dim=True), err=True, nl=False)
    try:
        from flexmoe.llm import LLM

        # A bar for what takes a while to read; the built-in model does not.
        llm = LLM(**{"progress": show and "model" in llm_options, **llm_options})
    finally:
        if show:
            click.echo("\r" + " " * len(notice) + "\r", err=True, nl=False)
    if not quiet:
        note(summary(llm.describe()))
    return llm


def note(text: str) -> None:
    """A line for the reader, not part of the output."""
    click.echo(click.style(text, dim=True), err=True)


def summary(about: Mapping[str, Any]) -> str:
    """Two lines of what `LLM.describe` tells: the model, and what computes it."""
    threads = f", {several(about['threads'], 'thread')}" if about["device"] == "cpu" else ""
    weights = f" with {about['quantization']} weights" if about["quantization"] else ""
    return (
        f"{about['model']}: {about['architecture']}, {count(about['parameters'])} parameters "
        f"({count(about['active_parameters'])} active), context {about['max_model_len']} tokens\n"
        f"{about['device']} {about['dtype']}{weights}{threads}, experts: {about['expert_backend']}, "
        f"decode: {about['decode_kernels']}, KV cache {size(about['kv_cache_bytes'])}"
    )


def several(number: int, thing: str) -> str:
    """1 GPU, 2 GPUs."""
    return f"{number} {thing}{'s' * (number != 1)}"


def count(number: int) -> str:
    """18381312 as 18.4M."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return str(number)


def size(num_bytes: int) -> str:
    """805306368 as 768 MiB."""
    value, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.4g} {units[0]}"


def duration(seconds: float) -> str:
    """0.0123 as 12.3 ms."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def speed(output: RequestOutput) -> str:
    """Tokens and times of one request that ran alone."""
    tokens = sum(len(sample.token_ids) for sample in output.outputs)
    words = [f"{len(output.prompt_token_ids)} + {tokens} tokens"]
    metrics = output.metrics
    if metrics.num_cached_tokens:
        words[0] += f" ({metrics.num_cached_tokens} of the prompt cached)"
    if metrics.ttft is not None:
        words.append(f"first after {duration(metrics.ttft)}")
    tpot = metrics.tpot(len(output.token_ids))
    if tpot:
        words.append(f"then {1 / tpot:.4g} tok/s")
    return ", ".join(words)


def total_speed(outputs: list[RequestOutput], seconds: float) -> str:
    """Tokens and throughput of requests that ran together."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    new = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    first = sorted(output.metrics.ttft or 0.0 for output in outputs)[len(outputs) // 2]
    return (
        f"{len(outputs)} prompts, {prompt} + {new} tokens in {duration(seconds)}, {new / seconds:.4g} tok/s, "
        f"first token after {duration(first)} (median)"
    )


def write(text: str) -> None:
    """Text of a model to stdout at once; without control characters if that is a terminal."""
    click.echo(text.translate(_CONTROL) if sys.stdout.isatty() else text, nl=False)
