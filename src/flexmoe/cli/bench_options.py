"""Options that the commands which measure share. Enters: words of the command line. Leaves: their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from flexmoe.config.engine import DTYPES, LOAD_FORMATS

Function = Callable[..., Any]

positive = click.IntRange(min=1)
layers_option = click.option("--layers", type=positive, help="Change a preset: how many layers.")

_SUBJECT = (
    click.option(
        "--load-format",
        type=click.Choice(LOAD_FORMATS),
        default="auto",
        show_default=True,
        help="`dummy`: random weights from config.json alone, as presets always have.",
    ),
    click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Number format."),
    click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N."),
    click.option("--threads", type=positive, help="Threads on a CPU.  [default: one a physical core]"),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Seed of prompts and of dummy weights."
    ),
)  # fmt: skip


def subject_options(function: Function) -> Function:
    """How the model is loaded, on what it runs, and the seed; under the names of bench's dataclasses of options."""
    for option in reversed(_SUBJECT):
        function = option(function)
    return function


def some_of(known: Sequence[str]) -> Callable[[click.Context, click.Parameter, str | None], tuple[str, ...]]:
    """A callback: words with commas between, each once, in the order given; none given: all that are known."""

    def chosen(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
        if value is None:
            return tuple(known)
        words = tuple(dict.fromkeys(word.strip() for word in value.split(",")))
        unknown = [word for word in words if word not in known]
        if unknown:
            raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(known)}.")
        return words

    return chosen
