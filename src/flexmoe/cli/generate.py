"""`flexmoe generate`: complete prompts. Text goes to stdout, what the model runs with and its speed to stderr."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import click

from flexmoe.cli.files import text_of
from flexmoe.cli.options import model_options, sampling_options
from flexmoe.cli.terminal import note, open_llm, speed, total_speed, write
from flexmoe.config.sampling import SamplingParams
from flexmoe.errors import RequestError

if TYPE_CHECKING:
    from flexmoe.engine.outputs import RequestOutput
    from flexmoe.llm import LLM

Prompt: TypeAlias = str | list[int]


@click.command()
@click.argument("prompt", nargs=-1)
@click.option("-f", "--file", type=click.File(encoding="utf-8"), help="A JSON array of prompts: texts, or token ids.")
@click.option("--chat", "as_chat", is_flag=True, help="Put each prompt to the model as a question of a chat.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each prompt instead of text.")
@click.option("-q", "--quiet", is_flag=True, help="Do not print what the model runs with and its speed.")
@click.option(
    "--record-routing",
    type=click.Path(dir_okay=False, writable=True),
    metavar="FILE",
    help="Write there how often each expert was chosen, for `flexmoe balance`.",
)
@sampling_options(temperature=0.7, max_tokens=128)
@model_options
def generate(
    prompt: tuple[str, ...],
    file: IO[str] | None,
    as_chat: bool,
    as_json: bool,
    quiet: bool,
    record_routing: str | None,
    sampling: SamplingParams,
    llm_options: dict[str, Any],
) -> None:
    """Complete each PROMPT.

    One prompt's text appears as it comes; several are computed together. Without a PROMPT the text is read from
    standard input: all of it as one prompt, or each entry of a JSON array as one.

    \b
    Examples:
      flexmoe generate "Once upon a time"
      flexmoe generate --max-tokens 20 --json "One" "Two" | jq .text
      echo '["One", "Two"]' | flexmoe generate -t 0
    """
    prompts: list[Prompt] = [*prompt, *(_from_file(file) if file else ())] or _from_stdin()
    with contextlib.ExitStack() as stack:
        llm = stack.enter_context(open_llm(llm_options, quiet=quiet))
        if record_routing is not None:
            stack.enter_context(llm.record_routing(record_routing))
        start = time.monotonic()
        given = [_chat_ids(llm, text) for text in prompts] if as_chat else prompts
        if len(given) == 1 and not as_json:
            outputs = [_stream(llm, given[0], sampling, echo=None if as_chat else prompts[0])]
        else:
            outputs = llm.generate(given, sampling)
            _print(outputs, prompts, as_json)
        if not quiet:
            seconds = time.monotonic() - start
            note(speed(outputs[0]) if len(outputs) == 1 else total_speed(outputs, seconds))


def _from_file(file: IO[str]) -> list[Prompt]:
    text = text_of(file)
    prompts = _json_array(text)
    if prompts is None:
        raise RequestError(f'{file.name} is not a JSON array of prompts; it should look like ["One", "Two"].')
    return prompts


def _from_stdin() -> list[Prompt]:
    if sys.stdin.isatty():
        raise click.UsageError("Give a PROMPT, a --file, or pipe a text in.")
    text = sys.stdin.read()
    prompts = _json_array(text) if text.lstrip().startswith("[") else None
    return prompts or [text.rstrip("\n")]


def _json_array(text: str) -> list[Prompt] | None:
    """The prompts of a JSON array; None if the text is something else, which may be a prompt itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, list) and value and all(_is_prompt(entry) for entry in value) else None


def _is_prompt(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(type(item) is int for item in value))


def _chat_ids(llm: LLM, prompt: Prompt) -> Prompt:
    if not isinstance(prompt, str):
        raise RequestError("--chat needs prompts that are texts; token ids are complete prompts already.")
    return llm.encode_chat([{"role": "user", "content": prompt}])[1]


def _stream(llm: LLM, prompt: Prompt, sampling: SamplingParams, echo: Prompt | None) -> RequestOutput:
    """Print the text as it comes; in a terminal after the prompt, which it continues."""
    shown, output = 0, None
    pieces = llm.stream(prompt, sampling)
    if isinstance(echo, str) and sys.stdout.isatty():
        click.echo(click.style(echo, bold=True), nl=False)
    for output in pieces:
        write(output.text[shown:])
        shown = len(output.text)
    assert output is not None, "a stream ends with a finished output"
    click.echo("" if llm.engine.tokenizer else " ".join(map(str, output.token_ids)))
    return output


def _print(outputs: Sequence[RequestOutput], prompts: Sequence[Prompt], as_json: bool) -> None:
    for number, (output, prompt) in enumerate(zip(outputs, prompts, strict=True)):
        if as_json:
            click.echo(json.dumps(_record(output, prompt), ensure_ascii=False))
        else:
            click.echo(("\n" if number else "") + click.style(f"[{number + 1}] {prompt}", bold=True))
            write(output.text + "\n")


def _record(output: RequestOutput, prompt: Prompt) -> dict[str, Any]:
    """One line of --json."""
    sample = output.outputs[0]
    return {
        "prompt": prompt,
        "text": sample.text,
        "token_ids": sample.token_ids,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.metrics.num_cached_tokens,
        "seconds_to_first_token": output.metrics.ttft,
        "seconds_per_token": output.metrics.tpot(len(sample.token_ids)),
    }
