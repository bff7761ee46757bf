"""`flexmoe bench machine`: measure this machine for the planner. Leaves: a machine file, and its figures on stdout."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flexmoe.cli.files import OUTPUT
from flexmoe.cli.options import debug_option
from flexmoe.cli.terminal import note

if TYPE_CHECKING:
    from flexmoe.config.machine import Machine


@click.command()
@click.option(
    "--out", type=OUTPUT, default="machine.json", show_default=True,
    help="File to write.",
)  # fmt: skip
@click.option("--name", help="What to call the machine.  [default: its host name]")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or cuda:N.")
@click.option(
    "--ranks", type=click.IntRange(min=1), default=1, show_default=True,
    help="Measure exchanges among 2, 4 ... so many ranks too. On GPUs each takes one.",
)  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(min=1),
    help="Begin no other measurement after so long.  [default: 540 on a GPU, 75 on a CPU]",
)  # fmt: skip
@click.option("--server-only", is_flag=True, help="Measure anew what a server adds, into an --out that is there.")
@debug_option
def machine(
    out: Path, name: str | None, device: str, ranks: int, seconds: float | None, *, server_only: bool
) -> None:  # fmt: skip
    """Measure this machine for the planner.

    Times the operations of MoE models, whole and as ranks share them, the speed of memory, what launching takes, and
    with --ranks what ranks need to exchange tensors; and with the extras [server] and [bench] what an HTTP server adds,
    by one of the built-in model over loopback. Writes a machine file for `flexmoe plan --machine`.

    \b
    Examples:
      flexmoe bench machine --out machine.json
      flexmoe bench machine --ranks 8 --name h200x8 --out h200x8.json
      flexmoe bench machine --server-only --out machine.json
    """
    from flexmoe.bench.machine import measure, with_server
    from flexmoe.config.machine import Machine

    if server_only:
        found = with_server(Machine.load(out), device, seconds, notify=note)
    else:
        found = measure(name or platform.node(), device, ranks, seconds, notify=note)
    found.save(out)
    _print(found, out)


def _print(machine: Machine, out: Path) -> None:
    spec = machine.device
    flops = ", ".join(f"{flops / 1e12:.3g} TFLOP/s in {dtype}" for dtype, flops in spec.peak_flops.items())
    click.echo(f"{machine.name}: {spec.name}, reads {spec.read_bandwidth / 1e9:,.1f} GB/s, computes {flops}")
    click.echo(
        f"{len(machine.samples)} operations, launch {spec.launch_s * 1e6:.2f} µs, step {spec.host_s * 1e6:.1f} µs"
    )
    for link in machine.links:
        click.echo(f"{link.name}: {link.latency_s * 1e6:.1f} µs, {link.bandwidth / 1e9:.2f} GB/s")
    click.echo(_serving(machine))
    click.echo(f"written to {out}")


def _serving(machine: Machine) -> str:
    serving = machine.serving
    if serving is None:
        return "what a server adds: not measured; predictions are of the engine alone"
    streams = ", ".join(f"{seconds * 1e6:,.0f} µs for {count}" for count, seconds in serving.streams)
    return (
        f"a server adds {serving.request_s * 1e3:.2f} ms to a request, {serving.prompt_token_s * 1e6:.2f} µs more for "
        f"a token of its prompt; to a step, by the streams that get a token, {streams}"
    )
