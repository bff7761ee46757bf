"""`flexmoe serve`: an HTTP server with OpenAI's API. The summary and the log go to stderr."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import click

from flexmoe import __version__
from flexmoe.cli.files import text_of
from flexmoe.cli.options import byte_size, model_options
from flexmoe.cli.terminal import note, summary
from flexmoe.config.server import ServerConfig
from flexmoe.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from flexmoe.server.service import Service

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_PACKAGES = ("fastapi", "fastapi_offline", "uvicorn", "httptools", "prometheus_client")
_natural, _positive = click.IntRange(min=0), click.IntRange(min=1)


@click.command(short_help="Serve MODEL over HTTP: OpenAI's API and a web page.")
@click.argument("name", metavar="[MODEL]", required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0: all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--served-model-name", metavar="NAME", help="What requests call the model.  [default: its own name]")
@click.option(
    "--api-key", "api_keys", multiple=True, metavar="KEY", help="Ask for this key; may be given several times."
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False),
    help="Keys in a file, one a line; # begins a comment.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin use the server from a browser; * for all. Repeatable.",
)
@click.option(
    "--max-body-bytes", metavar="BYTES", callback=byte_size, default="4MiB", show_default=True, help="Of a request."
)
@click.option("--max-n", type=_positive, default=16, show_default=True, help="Samples of one prompt.")
@click.option("--max-prompts", type=_positive, default=64, show_default=True, help="Prompts of one request.")
@click.option("--max-prompt-tokens", type=_positive, help="Of one prompt.  [default: the model's context]")
@click.option(
    "--max-waiting",
    type=_natural,
    default=256,
    show_default=True,
    help="Samples that may wait beside those that run; more are answered with status 429.",
)
@click.option(
    "--receive-seconds",
    type=float,
    default=20.0,
    show_default=True,
    help="How long a client may take to send.",
)
@click.option(
    "--drain-seconds", type=float, default=30.0, show_default=True, help="How long requests may go on after SIGTERM."
)
@click.option(
    "--step-seconds",
    type=float,
    help="How long a step may take before the engine counts as hung and health checks fail; 0: any time.  "
    "[default: 1800 on a CPU, else 300]",
)
@click.option(
    "--expert-interval",
    type=float,
    default=1.0,
    show_default=True,
    help="Seconds between looks at which experts are chosen; 0: never.",
)
@click.option(
    "--max-chunk-rate",
    type=float,
    help="Pieces of streams a second in all; where tokens come more quickly, a piece holds several.  "
    "[default: 1000 on a CPU, else 10000]",
)
@click.option(
    "--compare",
    metavar="hf|URL",
    help="What the web page compares with: Hugging Face transformers, or an OpenAI endpoint such as http://host/v1.",
)
@click.option(
    "--compare-key-file", type=click.Path(exists=True, dir_okay=False), help="The key of that endpoint, in a file."
)
@click.option("--log-prompts", is_flag=True, help="Write prompts to the log.")
@model_options
def serve(
    name: str | None,
    api_keys: tuple[str, ...],
    api_key_file: str | None,
    compare_key_file: str | None,
    llm_options: dict[str, Any],
    **limits: Any,
) -> None:
    """Serve MODEL over HTTP, as OpenAI's API does: the built-in one if none is named.

    \b
    Examples:
      flexmoe serve
      flexmoe serve path/to/model --port 9000 --api-key-file keys.txt
      flexmoe serve allenai/OLMoE-1B-7B-0924 --tensor-parallel-size 2
    """
    missing = next((package for package in _PACKAGES if importlib.util.find_spec(package) is None), None)
    if missing is not None:
        raise MissingDependencyError(missing.replace("_", "-"), "server", "flexmoe serve")
    if name is not None:
        if llm_options.get("model", name) != name:
            raise ConfigError(f"MODEL={name!r} and --model={llm_options['model']!r} differ; give one of them.")
        llm_options = {**llm_options, "model": name}
    keys = (*api_keys, *(_keys_in(api_key_file) if api_key_file else ()))
    compare_key = _keys_in(compare_key_file)[0] if compare_key_file else None
    config = ServerConfig(api_keys=keys, compare_key=compare_key, **limits)
    from flexmoe.server.run import serve as run

    sys.exit(run(llm_options, config, _announce))


def _keys_in(file: str) -> list[str]:
    lines = [line.partition("#")[0].strip() for line in text_of(file).splitlines()]
    keys = [line for line in lines if line]
    if not keys:
        raise ConfigError(f"the file {file!r} holds no key; write one a line.")
    return keys


def _announce(service: Service, url: str) -> None:
    """The start-up summary: what runs, how, where, and who may use it."""
    about, config = service.about, service.config
    note(f"FlexMoE {__version__}")
    note(summary(about))
    if "tensor_parallel_size" in about:
        degrees = ", ".join(
            f"{name.removesuffix('_size')} {value}" for name, value in about.items() if "_parallel_" in name
        )
        note(f"plan: {degrees}, dispatch: {about.get('moe_dispatch')}")
    note(
        f"up to {about['max_num_seqs']} samples at once, {config.max_waiting} more may wait; "
        f"{len(config.api_keys) or 'no'} API key{'s' * (len(config.api_keys) != 1)}"
    )
    if config.host not in _LOOPBACK and not config.api_keys:
        note(f"Anybody who reaches {config.host} can use this server; --api-key asks for a key.")
    note(f"model name: {service.name}")
    click.echo(f"Serving at {url} (API: {url}/v1, pages: {url}/docs, {url}/metrics). Ctrl-C ends it.", err=True)
