"""Tables of the report and of docs/performance.md. Enters: Rows. Leaves: Tables whose numbers are Values.

Each row has the percentage of the floor; where a row was recorded without it, `floors.py` computes it or says why not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flexmoe.report.charts import (
    CPU_METRICS,
    course_rows,
    cpu_pairs,
    elsewhere,
    engine_key,
    latency_groups,
    throughput_rows,
)
from flexmoe.report.figure import ENGINES, MODELS, model_name, short_device
from flexmoe.report.floors import explained, slice_percent, step_percent
from flexmoe.report.prompts import prompt_operations
from flexmoe.report.rows import Row, newest
from flexmoe.report.serving import served
from flexmoe.report.strategies import shares, spread_pairs
from flexmoe.report.table import Shown, Table, dates, number, percent, versions

_LONG_PROMPT = 256  # tokens from which a prompt is one to time
_LLAMA_METRICS = {
    "decode_bs1": "a token, one sequence (ms)",
    "decode_bs4": "a step, four sequences (ms)",
    "decode_bs16": "a step, 16 sequences (ms)",
    "prefill_512": "a prompt of 512 tokens (ms)",
    "throughput_32": "32 requests at once (tokens/s)",
    "start_to_first_token": "start to first token (s)",
}
# Ours, llama.cpp's, and what a table calls both.
_PRECISIONS = (("bfloat16", "bf16", "bf16"), ("int8", "q8_0", "8 bits"))


def tables(rows: Sequence[Row]) -> list[Table]:
    """All that these rows can fill."""
    makers: tuple[Callable[[Sequence[Row]], Table | None], ...]
    makers = (
        latency, latency_elsewhere, first_tokens, prompt_operations, throughput, spread, slices, experts, cpu,
        llama_cpp, served, published,
    )  # fmt: skip
    return [table for make in makers if (table := make(rows)) is not None]


def latency(rows: Sequence[Row]) -> Table | None:
    """Every batch size that was measured; beside it vLLM and what was wanted."""
    groups = latency_groups(rows)
    lines = [
        _latency_line(model, row, of_model, rows)
        for model, of_model in groups
        for row in sorted(of_model, key=lambda row: int(row.get("params.batch")))
        if engine_key(row) == "flexmoe"
    ]
    if not lines:
        return None
    ours = ("model", "batch", "FlexMoE, ms", "floor, ms", "% of floor", "experts read")
    header = (*ours, "vLLM 0.24, ms", "its %", "vLLM / ours", "goal missed")
    first = next(row for row in groups[0][1] if not row.is_cited)
    about = f"{versions(first)} {dates(rows_of(groups))} " + (
        "“Experts read”: distinct experts a layer, counted. vLLM's figures are cited: another run on such a card. "
        "“Goal missed”: the time that was set as a goal before measuring, in ms, where it was not reached."
    )
    return Table("latency", "A decode step", header, tuple(lines), about)


def latency_elsewhere(rows: Sequence[Row]) -> Table | None:
    """The same on other GPUs, beside nothing but the floor."""
    found = elsewhere(rows)
    lines = tuple(
        (
            Shown(short_device(str(row.get("device.name")))),
            Shown(model_name(row)),
            Shown(str(row.get("params.batch")), row.value("params.batch")),
            number(row.value("result.ms")),
            number(row.value("result.floor_ms")),
            number(row.value("result.percent_of_floor"), "{:.0f}"),
            number(row.value("result.distinct_experts"), "{:.1f}"),
        )
        for row in found
    )
    header = ("GPU", "model", "batch", "FlexMoE, ms", "floor, ms", "% of floor", "experts read")
    title = "A decode step on other GPUs"
    return Table("latency_elsewhere", title, header, lines, f"{versions(found[0])} {dates(found)}") if found else None


def rows_of(groups: Sequence[tuple[str, list[Row]]]) -> list[Row]:
    """All measured rows of the groups."""
    return [row for _, of_model in groups for row in of_model if not row.is_cited]


def _latency_line(model: str, row: Row, peers: Sequence[Row], rows: Sequence[Row]) -> tuple[Shown, ...]:
    batch, device = row.get("params.batch"), row.get("device.name")
    ours = row.value("result.ms")
    shown = [
        Shown(MODELS.get(model, model)),
        Shown(str(batch), row.value("params.batch")),
        number(ours),
        number(row.value("result.floor_ms")),
        number(row.value("result.percent_of_floor"), "{:.0f}"),
        number(row.value("result.distinct_experts"), "{:.1f}"),
    ]
    vllm = [peer for peer in peers if (peer.get("engine"), peer.get("params.batch")) == ("vllm", batch)]
    if vllm:
        theirs = vllm[0].value("result.ms")
        shown += [number(theirs), percent(vllm[0], "result.percent_of_floor"), number(theirs.over(ours), "{:.2f}×")]
    else:
        shown += [Shown("")] * 3
    goals = [
        goal.value("result.ms")
        for goal in rows
        if (goal.get("benchmark"), goal.get("model.label"), goal.get("params.batch")) == ("target", model, batch)
        and goal.get("device.name") == device
    ]
    # As shown: a goal of 3.7 is not missed by what rounds to it.
    missed = bool(goals) and ours.number > goals[0].number * 1.0005
    return (*shown, number(goals[0]) if missed else Shown(""))


def first_tokens(rows: Sequence[Row]) -> Table | None:
    """How long one prompt takes on a GPU; beside it vLLM and what was wanted."""
    found = [row for row in rows if row.get("benchmark") == "latency" and row.get("engine") == "flexmoe"]
    found = [row for row in found if row.get("device.kind") == "cuda" and row.get("result.first_token_ms")]
    found = [row for row in found if row.get("params.prompt_len") >= _LONG_PROMPT and row.get("params.batch") == 1]
    found = [
        row for row in newest(found, ("model.label", "params.prompt_len")) if " with " not in row.get("model.label")
    ]
    lines = tuple(
        (
            Shown(model_name(row)),
            Shown(f"{row.get('params.prompt_len'):,}", row.value("params.prompt_len")),
            number(row.value("result.first_token_ms")),
            percent(row, "result.percent_of_first_token_floor"),
            *_peer_and_goal(row, rows, "first_token", "result.first_token_ms", "params.prompt_len", less=True),
        )
        for row in sorted(found, key=lambda row: (-row.get("model.parameters"), row.get("params.prompt_len")))
    )
    header = ("model", "prompt", "FlexMoE, ms", "% of floor", "vLLM 0.24, ms", "vLLM / ours", "goal missed")
    title = "The first token of a prompt"
    about = "Floor: all rows in all layers, or reading; ours leaves out most rows of the last layer, 1.5 to 5% of it."
    note = f"{about} {versions(found[0])} {dates(found)}" if found else ""
    return Table("first_tokens", title, header, lines, note) if found else None


def throughput(rows: Sequence[Row]) -> Table | None:
    """Many requests that are there from the start; beside them vLLM and what was wanted."""
    found = throughput_rows(rows, larger=True)
    lines = tuple(
        (
            Shown(model_name(row)),
            Shown(_load(row)),
            number(row.value("result.output_tokens_per_s")),
            percent(row, "result.percent_of_floor"),
            percent(row, "result.device_busy_percent"),
            *_peer_and_goal(row, rows, "throughput", "result.output_tokens_per_s", "params.requests", less=False),
        )
        for row in sorted(found, key=lambda row: -row.get("model.parameters"))
    )
    header = (
        "model", "requests", "FlexMoE, tokens/s", "% of floor", "% busy", "vLLM 0.24, tokens/s", "ours / vLLM",
        "goal missed",
    )  # fmt: skip
    about = "Floor: reading memory for the decode steps alone. Busy: the device, once all was in full swing. "
    about += f"{versions(found[0])} {dates(found)}" if found else ""
    return Table("throughput", "Many requests at once", header, lines, about) if found else None


def _load(row: Row) -> str:
    """Requests that are there from the start, and the tokens of a step if somebody chose them."""
    load = f"{row.get('params.requests')} of {row.get('params.prompt_len')} + {row.get('params.output_len')}"
    steps = row.get("params.max_num_batched_tokens")
    return load if steps is None else f"{load}, steps of {steps:,} tokens"


def _peer_and_goal(
    row: Row, rows: Sequence[Row], benchmark: str, key: str, size: str, *, less: bool
) -> tuple[Shown, ...]:
    """vLLM's cited figure of the same load on the same device, how many times better ours is, and a goal missed."""
    place = ("model.label", "device.name", size)
    same = [one for one in rows if one.is_cited and all(one.get(name) == row.get(name) for name in place)]
    ours, shown = row.value(key), [Shown(""), Shown("")]
    for peer in same:
        if (peer.get("benchmark"), peer.get("engine")) == (benchmark, "vllm"):
            theirs = peer.value(key)
            shown = [number(theirs), number(theirs.over(ours) if less else ours.over(theirs), "{:.2f}×")]
    goals = [one.value(key) for one in same if one.get("benchmark") == f"{benchmark}_target"]
    missed = [goal for goal in goals if (goal.number < ours.number) == less and goal.number != ours.number]
    return (*shown, number(missed[0]) if missed else Shown(""))


def spread(rows: Sequence[Row]) -> Table | None:
    """Strategies on several GPUs, beside one GPU of the same run."""
    pairs = spread_pairs(rows)
    if not pairs:
        return None
    lines = tuple(_spread_line(row, alone) for row, alone in pairs)
    found = [row for row, _ in pairs]
    header = (
        "model", "batch", "GPUs", "strategy", "ms a step", "% of floor", "one GPU, ms", "of its time", "busiest / mean",
        "sums",
    )  # fmt: skip
    about = f"{versions(found[0])} {dates(found)} " + (
        "Floor: all GPUs read what a step must together. “Busiest / mean”: choices of the rank that got most of a "
        "step, over the mean. “Sums”: how ranks add up."
    )
    return Table("spread", "Several GPUs", header, lines, explained(lines, about))


def _spread_line(row: Row, alone: Row) -> tuple[Shown, ...]:
    ours, one = row.value("result.step_ms.median"), alone.value("result.step_ms.median")
    how = str(row.get("config.decode_kernels"))
    return (
        Shown(model_name(row)),
        Shown(str(row.get("params.batch")), row.value("params.batch")),
        Shown(str(row.get("config.ranks")), row.value("config.ranks")),
        Shown(str(row.get("config.strategy"))),
        number(ours),
        step_percent(row, "result.step_ms.median"),
        number(one),
        number(ours.over(one), "{:.2f}"),
        number(row.value("result.imbalance.step"), "{:.2f}"),
        Shown("one launch" if how.endswith("one launch") else "all-reduce"),
    )


def slices(rows: Sequence[Row]) -> Table | None:
    """One rank's share of a MoE layer, by strategy and degree; what part of one rank's time the smallest take."""
    found = sorted(shares(rows), key=lambda group: -group["tensor", 1].get("weight_bytes"))
    if not found:
        return None
    parts = sorted({part for group in found for part in group}, key=lambda part: (part[0] != "tensor", part[1]))
    least = [max((part for part in parts if part[0] == one), key=lambda part: part[1]) for one in ("tensor", "expert")]
    lines = tuple(_slices_line(group, parts, least) for group in found)
    named = [f"{strategy} {degree}, µs" for strategy, degree in parts if degree > 1]
    ratios = (f"{strategy} {degree} / one" for strategy, degree in least)
    percents = (f"{strategy} {degree}, % of floor" for strategy, degree in least)
    header = ("model", "batch", "one rank, µs", *named, *ratios, "one rank, % of floor", *percents)
    whole = [group["tensor", 1] for group in found]
    about = f"{versions(whole[0])} {dates(whole)} " + (
        "A rank's router, its slices or experts by grouped kernels, and combine, alone on the GPU: nothing is sent. "
        "Choices are random; of the expert strategy the rank that got most of them. At best a share of n takes 1 / n. "
        "Floor: reading the router and the experts, or their slices, that were chosen, as fast as a plain stream."
    )
    return Table("slices", "A MoE layer in slices", header, lines, about)


def _slices_line(
    group: dict[tuple[str, int], Row], parts: Sequence[tuple[str, int]], least: Sequence[tuple[str, int]]
) -> tuple[Shown, ...]:
    whole = group["tensor", 1]
    name = str(whole.get("model"))
    times = {part: row.value("block.median") for part, row in group.items()}
    return (
        Shown(MODELS.get(name, name)),
        Shown(str(whole.get("batch")), whole.value("batch")),
        *(number(times[part]) if part in times else Shown("") for part in parts),
        *(number(times[part].over(times["tensor", 1]), "{:.2f}") if part in times else Shown("") for part in least),
        *(slice_percent(group[part]) if part in group else Shown("") for part in (("tensor", 1), *least)),
    )


def experts(rows: Sequence[Row]) -> Table | None:
    """Latency against the number of experts, the course project's first."""
    cited = [row for row in rows if row.get("benchmark") in ("course_experts", "course_latency")]
    found = newest(course_rows(rows), ("device.name", "engine", "model.experts", "params.dtype"))
    if not found:
        return None
    found.sort(key=lambda row: (str(row.get("device.name")), row.get("model.experts")))
    lines = tuple(
        (
            Shown(ENGINES.get(str(row.get("engine")), str(row.get("version")) + " (cited)")),
            Shown(short_device(str(row.get("device.name")))),
            Shown(str(row.get("model.experts")), row.value("model.experts")),
            number(row.value("result.ms"), "{:g}" if row.is_cited else None),
            step_percent(row, "result.ms"),
            Shown(str(row.get("result.remark") or "")),
        )
        for row in (*cited, *found)
    )
    header = ("engine", "device", "experts", "ms a token", "% of floor", "remark")
    about = f"{versions(found[-1])} {dates(found)}"
    if cited:
        device, speed = short_device(str(cited[0].get("device.name"))), cited[0].get("device.read_gb_s")
        about += f" Floor of cited rows: at {speed:g} GB/s, as the data sheet of the {device} says; 16 bits assumed."
    return Table("experts", "Latency against the number of experts", header, lines, explained(lines, about))


def cpu(rows: Sequence[Row]) -> Table | None:
    """Ours as it comes beside the best configuration of transformers, metric by metric."""
    pairs = cpu_pairs(rows)
    if not pairs:
        return None
    lines = []
    for metric, ours, theirs in pairs:
        mine, other = ours.value("median"), theirs.value("median")
        config = [theirs.get(f"config.{name}") for name in ("dtype", "experts", "cache")]
        compiled = ", compiled" if theirs.get("config.compile") else ""
        lines.append(
            (
                Shown(CPU_METRICS[metric]),
                number(mine),
                number(other),
                Shown(", ".join(str(part) for part in config if part) + compiled),
                number(other.over(mine), "{:.2f}×"),
                percent(ours, "percent_of_floor"),
            )
        )
    first = pairs[0][1]
    about = (
        f"Built-in model, {first.get('device.cores')} cores of {short_device(str(first.get('device.cpu')))}; medians. "
    )
    header = ("what", "FlexMoE", "transformers", "its configuration", "ratio", "% of floor")
    if any((ours.get("percent_of_floor") or 0) > 100 for _, ours, _ in pairs):
        about += "Above 100% of the floor: the caches hold part of so small a model. "
    about += f"{versions(first)} {dates([ours for _, ours, _ in pairs])}"
    return Table("cpu", "On a CPU, beside the best of transformers", header, tuple(lines), about)


def llama_cpp(rows: Sequence[Row]) -> Table | None:
    """Ours beside llama.cpp at equal precision, and transformers in bf16, for each model and metric."""
    found = [row for row in rows if row.get("benchmark") == "cpu_compare_llama_cpp" and row.get("phase") == "final"]
    found = newest([row for row in found if not row.get("quick")], ("model.name", "metric", "engine", "config.dtype"))
    lines, used = [], []
    for model in dict.fromkeys(str(row.get("model.name")) for row in found):
        for metric, what in _LLAMA_METRICS.items():
            same = [row for row in found if (row.get("model.name"), row.get("metric")) == (model, metric)]
            by = {(str(row.get("engine")), str(row.get("config.dtype"))): row for row in same}
            for ours, theirs, precision in _PRECISIONS:
                if ("flexmoe", ours) in by and ("llama.cpp", theirs) in by:
                    trio = by["flexmoe", ours], by["llama.cpp", theirs], by.get(("transformers", ours))
                    lines.append((Shown(model), Shown(what), Shown(precision), *_beside(*trio)))
                    used.append(trio[0])
    if not lines:
        return None
    header = ("model", "what", "weights", "FlexMoE", "% of floor", "llama.cpp", "its %", "transformers", "ratio")
    first = used[0]
    version = next((said for row in found if (said := row.get("about.llama-cpp-python"))), "of unknown version")
    about = (
        f"Random weights, {first.get('device.cores')} cores; medians of one run whose rounds interleave. “Ratio”: how "
        f"many times better ours is than the best of the others. The floor reads the whole head, through which our "
        f"greedy steps in bf16 look in 8 bits. llama-cpp-python {version}; "
        f"{versions(first)} {dates(used)}"
    )
    return Table("llama_cpp", "On a CPU, beside llama.cpp", header, tuple(lines), about)


def _beside(ours: Row, llama: Row, transformers: Row | None) -> tuple[Shown, ...]:
    """Our figure, theirs, and the ratio to the better of them."""
    mine, other = ours.value("median"), llama.value("median")
    hf = None if transformers is None else transformers.value("median")
    peers = [other] if hf is None else [other, hf]
    if ours.get("unit") == "tokens/s":
        ratio = mine.over(max(peers, key=lambda value: value.number))
    else:
        ratio = min(peers, key=lambda value: value.number).over(mine)
    percents = (percent(row, "percent_of_floor") for row in (ours, llama))
    shown = (number(mine), next(percents), number(other), next(percents))
    return (*shown, Shown("") if hf is None else number(hf), number(ratio, "{:.2f}×"))


def published(rows: Sequence[Row]) -> Table | None:
    """Figures of systems that cannot run these models: facts that are cited, compared with nothing."""
    found = [row for row in rows if row.get("benchmark") == "published"]
    if not found:
        return None
    lines = tuple(
        (
            Shown(f"FlexFlow Serve, {row.get('version')}"),
            Shown(f"{row.get('model.label')}, batch {row.get('params.batch')}"),
            number(row.value("result.ms"), "{:.0f}"),
            Shown(str(row.get("result.peer"))),
            number(row.value("result.peer_ms"), "{:.0f}"),
            percent(row, "result.percent_of_floor"),
        )
        for row in found
    )
    header = ("system", "model", "its ms a token", "beside", "ms a token", "% of floor")
    about = f"Cited, not measured here: {found[0].get('source')}."
    return Table("published", "Published elsewhere", header, lines, about)
