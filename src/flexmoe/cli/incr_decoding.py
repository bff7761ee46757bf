"""`flexmoe incr_decoding`: FlexFlow's program of that name. Text goes to stdout, or records to its output file."""

from __future__ import annotations

import click

from flexmoe.cli.options import debug_option
from flexmoe.cli.terminal import note, write


# No -h: click would find it inside every flag with one dash and an h, such as -cache-folder.
@click.command(
    short_help="Complete prompts with FlexFlow's flags and files.",
    context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]},
)
@click.argument("flags", nargs=-1, type=click.UNPROCESSED)
@debug_option
def incr_decoding(flags: tuple[str, ...]) -> None:
    """Complete prompts as FlexFlow's `incr_decoding` does: same FLAGS, same files.

    \b
      -llm-model NAME                a folder, a hub id, or builtin
      -prompt FILE                   JSON: ["One", "Two"]; comments are allowed
      -output-file FILE              a record of each request is appended; without it, texts are printed
      -config-file FILE              FlexFlow's JSON configuration; flags beside it count more
      -cache-folder FOLDER           where the hub's files are kept
      --use-full-precision           compute in fp32 (--use-bf16: in bfloat16)
      --max-requests-per-batch N     [default: 8]
      --max-tokens-per-batch N       [default: 128]
      --max-sequence-length N        [default: 256]
      --max-length N                 prompt and output together  [default: 128]
      --do-sample --temperature X --topp X --topk N
      -tensor-parallelism-degree N   also -data-, -pipeline-, -expert-; -moe-strategy NAME
      -ll:gpu N -ll:fsize MB ...     as in FlexFlow; Legion's other flags are read over

    One dash or two, they mean the same. docs/flexflow.md lists all of them.
    """
    from flexmoe.serve import incremental

    given, ignored = incremental.parse(flags)
    if ignored:
        note(f"Read over: {' '.join(ignored)}")
    config = incremental.complete(given)
    results = incremental.run(config)
    if config["verbose"] or not config["output_file"]:
        for result in results:
            write(f"{result.output_text}\n")
