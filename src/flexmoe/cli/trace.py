"""`flexmoe trace`: the way of a token through the engine. Enters: a text. Leaves: stages, shapes and milliseconds."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from flexmoe.cli.options import model_options
from flexmoe.cli.terminal import open_llm
from flexmoe.config.sampling import SamplingParams

if TYPE_CHECKING:
    from rich.table import Table

    from flexmoe.bench.timeline import Mark, Timeline
    from flexmoe.llm import LLM

# The stages in the order of the way: mark in the timeline, name, what happens, file under flexmoe/.
_STAGES = (
    ("encode", "tokenizer", "text to token ids", "engine/tokenizer.py"),
    ("schedule", "scheduler.schedule", "choose what this step computes", "scheduling/scheduler.py"),
    ("batch", "model_runner", "positions, cache slots, keys each row sees", "engine/batch.py"),
    ("embedding", "embedding", "a row for each token", "models/decoder.py"),
    ("attention", "attention", "norm, then look at earlier tokens", "layers/attention.py"),
    ("router", "router", "add, norm, choose K experts a token", "moe/router.py"),
    ("dispatch", "dispatch", "rows to where their experts are", "moe/dispatch.py"),
    ("experts", "experts", "weighted sum of the experts' outputs", "moe/experts/"),
    ("combine", "combine", "rows back to their tokens, shared expert", "moe/block.py"),
    ("moe", "moe/block", "norm, router, experts at once, in C", "moe/block.py"),
    ("mlp", "mlp", "add, norm, dense feed-forward", "layers/mlp.py"),
    ("add", "residual", "add", "models/decoder.py"),
    ("norm", "norm", "the final norm", "layers/norm.py"),
    ("logits", "logits", "a score for each token there is", "models/decoder.py"),
    ("sampler", "sampler", "choose the next token", "engine/sampler.py"),
    ("update", "scheduler.update", "append it, see who is done", "scheduling/scheduler.py"),
    ("detokenizer", "detokenizer", "token ids to text", "engine/detokenizer.py"),
)

_RUNS = 4  # the first warms up
_WIDE = 115  # columns of a terminal from which there is room for what happens


@dataclass(frozen=True, slots=True)
class Stage:
    """All marks of one stage in one step: how many (layers), their seconds together, the shape of one's result."""

    count: int
    seconds: float
    shape: tuple[int, ...] | None


@click.command()
@click.argument("text", default="hello")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@model_options
def trace(text: str, as_json: bool, llm_options: dict[str, Any]) -> None:
    """Show the way of a token through the engine.

    Two steps are shown, stage by stage: the one that computes the whole TEXT (prefill) and gives its next token, and
    the one that computes that token (decode) and gives the one after. Each is the quickest of several runs.
    """
    with open_llm({**llm_options, "enable_prefix_caching": False}, quiet=as_json) as llm:
        result = _best([_run(llm, text) for _ in range(_RUNS)])
        if as_json:
            click.echo(json.dumps(_record(result), ensure_ascii=False))
            return
        from rich.console import Console

        console = Console(highlight=False)
        console.print(f"{text!r} is {_spelt(llm, result.prompt)}", markup=False)
        console.print(_stage_table(result, explain=console.width >= _WIDE))
        console.print(f"The text goes on with {_spelt(llm, result.output)}.\n", markup=False)
        if result.decode.topk:
            token = llm.tokenizer.decode(result.output[:1])
            console.print(f"Experts of {token!r} and their weights:", markup=False)
            console.print(_expert_table(result))


@dataclass(frozen=True, slots=True)
class Result:
    """Token ids of the text, the two tokens that follow, and how the steps went that made them."""

    prompt: list[int]
    output: list[int]
    encode_seconds: float
    prefill: Timeline
    decode: Timeline


def _run(llm: LLM, text: str) -> Result:
    from flexmoe.bench.timeline import trace_step

    engine = llm.engine
    start = time.perf_counter()
    ids = llm.encode(text)
    seconds = time.perf_counter() - start
    # stream: the text is wanted after each step.
    sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    request_id = engine.add_request(ids, sampling, prompt=text, stream=True)
    prefill, decode = trace_step(engine), trace_step(engine)
    output = engine.abort(request_id)
    assert output is not None, "two of three tokens are computed"
    return Result(ids, list(output.token_ids), seconds, prefill, decode)


def _best(runs: Sequence[Result]) -> Result:
    """The runs differ in their times only: take the quickest prefill and the quickest decode."""
    prefill = min((run.prefill for run in runs), key=_total)
    decode = min((run.decode for run in runs), key=_total)
    return replace(runs[-1], prefill=prefill, decode=decode)


def _total(timeline: Timeline) -> float:
    return sum(mark.seconds for mark in timeline.marks)


def _stages(marks: Sequence[Mark]) -> dict[str, Stage]:
    """Marks by stage. The C kernels do a whole MoE block at once: then its stages are not told apart."""
    fused = not any(mark.stage == "experts" for mark in marks)
    stages: dict[str, Stage] = {}
    for mark in marks:
        name = "moe" if fused and mark.stage in ("router", "combine") else mark.stage
        before = stages.get(name, Stage(0, 0.0, None))
        ends = name != "moe" or mark.stage == "combine"
        shape = mark.shape if ends else before.shape
        stages[name] = Stage(before.count + ends, before.seconds + mark.seconds, shape)
    return stages


def _both(result: Result) -> tuple[dict[str, Stage], dict[str, Stage]]:
    prefill, decode = _stages(result.prefill.marks), _stages(result.decode.marks)
    return {"encode": Stage(1, result.encode_seconds, (len(result.prompt),)), **prefill}, decode


def _stage_table(result: Result, explain: bool) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    both = _both(result)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("stage", "a step", no_wrap=True)
    if explain:
        table.add_column("what", style="dim", no_wrap=True)
    for title, stages in zip(("prefill", "decode"), both, strict=True):
        total = sum(stage.seconds for stage in stages.values())
        table.add_column(title, no_wrap=True)
        table.add_column("ms", f"{total * 1e3:.2f}", justify="right", no_wrap=True)
    for mark, name, what, _ in _STAGES:
        if mark in both[0] or mark in both[1]:
            cells = [cell for stages in both for cell in _cells(stages.get(mark))]
            table.add_row(name, *([what] if explain else []), *cells)
    return table


def _cells(stage: Stage | None) -> tuple[str, str]:
    """Shape, with the number of layers if there are several, and milliseconds."""
    if stage is None:
        return "", ""
    shape = "" if stage.shape is None else str(list(stage.shape))
    layers = f" x{stage.count}" if stage.count > 1 else ""
    return shape + layers, f"{stage.seconds * 1e3:.2f}"


def _expert_table(result: Result) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("layer", justify="right")
    table.add_column("experts")
    for layer, (ids, weights) in result.decode.topk.items():
        chosen = zip(ids[0].tolist(), weights[0].tolist(), strict=True)
        table.add_row(str(layer), "   ".join(f"{expert} ({weight:.2f})" for expert, weight in chosen))
    return table


def _spelt(llm: LLM, ids: Sequence[int]) -> str:
    """`hello` (704)  ` world` (306), shortened in the middle if there are many."""
    words = [f"{llm.tokenizer.decode([token], skip_special_tokens=False)!r} ({token})" for token in ids]
    if len(words) > 12:
        words[6:-6] = [f"... {len(words) - 12} more ..."]
    return "  ".join(words)


def _record(result: Result) -> dict[str, Any]:
    """The object of --json. files: where in flexmoe/ to read about each stage."""
    prefill, decode = _both(result)
    return {
        "prompt_token_ids": result.prompt,
        "token_ids": result.output,
        "prefill": _as_json(prefill),
        "decode": _as_json(decode),
        "experts": {
            layer: {"topk_ids": ids[0].tolist(), "topk_weights": weights[0].tolist()}
            for layer, (ids, weights) in result.decode.topk.items()
        },
        "files": {name: file for _, name, _, file in _STAGES},
    }


def _as_json(stages: dict[str, Stage]) -> dict[str, Any]:
    return {
        name: {"count": stage.count, "milliseconds": stage.seconds * 1e3, "shape": stage.shape}
        for mark, name, _, _ in _STAGES
        if (stage := stages.get(mark)) is not None
    }
