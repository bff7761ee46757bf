"""tools/cli_help.py on a small command line of its own."""

from __future__ import annotations

import click

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
