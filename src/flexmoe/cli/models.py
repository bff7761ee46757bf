"""`flexmoe models`: what can be run. Enters: the presets and families. Leaves: tables, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from flexmoe.cli.options import debug_option
from flexmoe.cli.terminal import count

if TYPE_CHECKING:
    from rich.table import Table

    from flexmoe.config.model import ModelConfig


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@debug_option
def models(as_json: bool) -> None:
    """List the built-in model, presets and model families.

    A preset is the configuration of a well-known model without its weights: run it with random ones by
    `--model PRESET --load-format dummy`. A family is a kind of model that can be loaded from a folder or the Hub.
    """
    catalogue = {"builtin": _builtin(), "presets": list(_presets()), "families": list(_families())}
    if as_json:
        click.echo(json.dumps(catalogue, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    for table in _tables(catalogue):
        console.print(table, "")


def _builtin() -> dict[str, Any] | None:
    """The model in the package; None where it was left out."""
    from flexmoe.config.engine import LoadConfig
    from flexmoe.errors import CheckpointError
    from flexmoe.models.hub import open_model

    try:
        source = open_model(LoadConfig(load_format="dummy"))
    except CheckpointError:
        return None
    return {"name": source.name, "folder": str(source.folder), **_facts(source.config)}


def _presets() -> Iterator[dict[str, Any]]:
    from flexmoe.models.presets import PRESETS

    for preset in PRESETS.values():
        about = {"name": preset.name, "hub_id": preset.hub_id, "description": preset.description}
        yield about | _facts(preset.config)


def _families() -> Iterator[dict[str, Any]]:
    from flexmoe.models.families import FAMILIES

    for family in FAMILIES.values():
        yield {"model_type": family.model_type, "architecture": family.architecture}


def _facts(config: ModelConfig) -> dict[str, Any]:
    return {
        "architecture": config.architecture,
        "parameters": config.num_parameters(),
        "active_parameters": config.num_active_parameters(),
        "layers": config.num_layers,
        "experts": config.moe.num_experts if config.moe else None,
        "experts_per_token": config.moe.top_k if config.moe else None,
        "context": config.max_position,
    }


def _tables(catalogue: dict[str, Any]) -> Iterator[Table]:
    """Narrow enough for 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    builtin = catalogue["builtin"]
    rows = [("builtin", {"hub_id": "in the package", **builtin})] if builtin else []
    rows += [(preset["name"], preset) for preset in catalogue["presets"]]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="Models", title_justify="left")
    for column in ("--model", "size", "active", "experts", "weights"):
        table.add_column(column, no_wrap=True)
    for name, facts in rows:
        experts = f"{facts['experts_per_token']} of {facts['experts']}" if facts["experts"] else "-"
        table.add_row(name, count(facts["parameters"]), count(facts["active_parameters"]), experts, facts["hub_id"])
    yield table
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="Families", title_justify="left")
    for column in ("model_type in config.json", "architecture"):
        table.add_column(column, no_wrap=True)
    for family in catalogue["families"]:
        table.add_row(family["model_type"], family["architecture"])
    yield table
