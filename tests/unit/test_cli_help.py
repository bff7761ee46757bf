"""tools/cli_help.py on a small command line of its own; and what the help of ours says."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner

from flexmoe.cli.main import main
from flexmoe.config.machine import shipped_machines
from tools.cli_help import WIDTH, commands, render


@click.group()
def app() -> None:
    """Does things."""


@app.command()
@click.argument("prompt")
@click.option("--max-tokens", default=128, show_default=True, help="At most this many " + "very " * 20 + "new tokens.")
def generate(prompt: str, max_tokens: int) -> None:
    """Write on."""


@app.group()
def models() -> None:
    """About models."""


@models.command("list")
def list_models() -> None:
    """All of them."""


@app.command(hidden=True)
def secret() -> None:
    """Not for the page."""


def test_every_visible_command_has_a_section_with_its_help() -> None:
    assert [c.command_path for c in commands(app, "app")] == ["app", "app generate", "app models", "app models list"]
    page = render(app, "app")
    assert "## app models list\n\n```text\nUsage: app models list [OPTIONS]\n\n  All of them." in page
    assert "Usage: app generate [OPTIONS] PROMPT\n\n  Write on." in page
    assert "secret" not in page


def test_the_width_is_that_of_the_page_and_not_of_the_terminal() -> None:
    lines = render(app, "app").split("## app generate")[1].splitlines()
    assert 80 < max(map(len, lines)) <= WIDTH


def test_the_page_shows_the_options_for_help_that_there_are() -> None:
    page = render(main)
    assert "-h, --help     Show this message and exit." in page.split("## flexmoe generate")[0]
    assert "-h, --help" in page.split("## flexmoe bench latency")[1]


@pytest.mark.parametrize("group", [[], ["bench"]])
def test_lists_of_commands_are_not_cut_in_a_terminal(group: list[str]) -> None:
    shown = CliRunner().invoke(main, [*group, "--help"], terminal_width=80)
    assert shown.exit_code == 0
    assert "Commands:" in shown.output
    assert "..." not in shown.output.split("Commands:")[1]


def test_examples_name_machines_that_there_are() -> None:
    named = re.findall(r"--machine ([a-z0-9-]+)(?= |$)", render(main), re.MULTILINE)
    assert {"h100x8"} <= set(named) <= set(shipped_machines())


def test_a_machine_left_out_is_told_which_there_are() -> None:
    shown = CliRunner().invoke(main, ["plan", "mixtral-8x7b"])
    assert shown.exit_code == 2
    assert "Missing option '--machine'; use one of cpu2, " in shown.stderr
