"""What figures show. Enters: Rows. Leaves: Figures of Panels of Series of Points, each Point a Value with its cells.

A figure whose rows are not there is not made: a user's own rows may hold less than ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from flexmoe.report.figure import (
    ENGINES,
    MODELS,
    Figure,
    Panel,
    Point,
    Series,
    bar_panels,
    measured,
    model_name,
    short_device,
)
from flexmoe.report.rows import Row, newest
from flexmoe.report.strategies import spread, strategies

_SHOWN_BATCHES = (1, 8, 32, 128)
_MOST_PANELS = 3
_COURSE_MODEL = "tinymistral-6x248m"
_LENGTHS = ("params.prompt_len", "params.output_len")
_STEPS = "params.max_num_batched_tokens"  # in rows of whoever chose them
OPERATIONS = {
    "qkv": "Q, K, V with norm",
    "decode_attention": "attention",
    "o": "output projection",
    "route": "router",
    "topk": "top-k",
    "group_by_expert": "group by expert",
    "expert_gate_up_grouped": "experts: gate, up, SwiGLU",
    "expert_down_grouped": "experts: down",
    "combine": "combine",
}
CPU_METRICS = {
    "decode_bs1": "a token, one sequence (ms)",
    "decode_bs8": "a step, eight sequences (ms)",
    "prefill_512": "a prompt of 512 tokens (ms)",
    "start_to_first_token": "start to first token (s)",
}


def figures(rows: Sequence[Row]) -> list[Figure]:
    """All that these rows can fill."""
    makers: tuple[Callable[[Sequence[Row]], Figure | None], ...]
    makers = (latency, experts, cpu, strategies, spread, operations, profiled, throughput, served)
    return [figure for make in makers if (figure := make(rows)) is not None]


# ---------------------------------------------------------------------------------------------- latency


def latency_groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(model, its rows), of unchanged models on one device, GPUs first and the largest model first.

    Of each engine and batch size the newest row, of the prompt length that most rows have. Cited rows on the same
    device are among them, marked by `is_cited`.
    """
    found = _timed_steps(rows)
    own = [row for row in found if not row.is_cited and " with " not in row.get("model.label")]
    if not own:
        return []
    on_gpu = [row for row in own if row.get("device.kind") == "cuda"] or own
    device = Counter(row.get("device.name") for row in on_gpu).most_common(1)[0][0]
    own = [row for row in own if row.get("device.name") == device]
    length = Counter(row.get("params.prompt_len") for row in own).most_common(1)[0][0]
    sizes = {row.get("model.label"): row.get("model.parameters") for row in own}
    groups = []
    for model in sorted(sizes, key=lambda label: -sizes[label]):
        fitting = [
            row
            for row in found
            if (row.get("model.label"), row.get("device.name"), row.get("params.prompt_len")) == (model, device, length)
        ]
        groups.append((model, newest(fitting, ("cited", "engine", "params.batch"))))
    return groups


def elsewhere(rows: Sequence[Row]) -> list[Row]:
    """Of our engine's steps on GPUs that `latency_groups` leaves out the newest, also of models with fewer layers."""
    main = {row.get("device.name") for _, group in latency_groups(rows) for row in group}
    found = [row for row in _timed_steps(rows) if row.get("device.kind") == "cuda" and not row.is_cited]
    found = [row for row in found if row.get("device.name") not in main and engine_key(row) == "flexmoe"]
    found = newest(found, ("device.name", "model.label", "params.batch", "params.prompt_len"))
    return sorted(
        found, key=lambda row: (row.get("device.name"), -row.get("model.parameters"), row.get("params.batch"))
    )


def _timed_steps(rows: Sequence[Row]) -> list[Row]:
    """Rows of latency with a time. On a machine that is too busy a difference of two times may be none."""
    return [row for row in rows if row.get("benchmark") == "latency" and (row.get("result.ms") or 0) > 0]


def latency(rows: Sequence[Row]) -> Figure | None:
    """Milliseconds a decode step at each batch size, beside the floor and the peers."""
    groups = latency_groups(rows)[:_MOST_PANELS]
    if not groups:
        return None
    panels = tuple(Panel(MODELS.get(model, model), _latency_series(of_model)) for model, of_model in groups)
    first = next(row for row in groups[0][1] if not row.is_cited)
    about = (
        f"{first.get('device.name')}, {first.get('params.dtype')}, prompts of {first.get('params.prompt_len')} tokens"
    )
    return Figure("latency", "latency", "ms a decode step", panels, f"{about}, greedy; {measured(first)}")


def engine_key(row: Row) -> str:
    """A transformers figure that was cited is another series than one that was measured."""
    engine = str(row.get("engine"))
    return f"{engine} cited" if row.is_cited and engine.startswith("hf") else engine


def _latency_series(rows: Iterable[Row]) -> tuple[Series, ...]:
    shown = [row for row in rows if row.get("params.batch") in _SHOWN_BATCHES]
    shown.sort(key=lambda row: int(row.get("params.batch")))
    ours = [row for row in shown if row.get("engine") == "flexmoe"]
    floor = tuple(Point(str(row.get("params.batch")), row.value("result.floor_ms")) for row in ours)
    series = [Series("floor", ENGINES["floor"], floor)]
    for key in ENGINES:
        points = tuple(
            Point(str(row.get("params.batch")), row.value("result.ms"), row.value("result.percent_of_floor"))
            for row in shown
            if engine_key(row) == key
        )
        if points:
            series.append(Series(key, ENGINES[key], points))
    return tuple(series)


# ---------------------------------------------------------------------------------------------- number of experts


def experts(rows: Sequence[Row]) -> Figure | None:
    """Latency against how many experts a layer holds, at the same top-k; beside it the course project's figures."""
    found = course_rows(rows)
    cited = [row for row in rows if row.get("benchmark") == "course_experts"]
    panels = []
    for device in dict.fromkeys(row.get("device.name") for row in found):
        of_device = [row for row in found if row.get("device.name") == device]
        of_device = _like_the_last(sorted(of_device, key=lambda row: str(row.get("time"))), _LENGTHS)
        of_device = newest(of_device, ("engine", "model.experts"))
        series = _expert_series(of_device)
        if max((len(one.points) for one in series), default=0) > 1:
            panels.append(Panel(f"here, {short_device(str(device)).removeprefix('NVIDIA ')}", series))
    if not panels:
        return None
    if cited:
        panels.insert(0, Panel("course, L4 (cited)", _expert_series(cited)))
    about = f"TinyMistral-6x248M's shape, two experts a token, one sequence; {measured(found[-1])}"
    return Figure("experts", "experts", "ms a token", tuple(panels), about)


def course_rows(rows: Sequence[Row]) -> list[Row]:
    """Latency of TinyMistral's shape in all its layers, one sequence, two experts a token or the only one there is."""
    found = _timed_steps(rows)
    found = [row for row in found if (row.get("model.name"), row.get("params.batch")) == (_COURSE_MODEL, 1)]
    layers = max((row.get("model.layers") for row in found), default=0)
    return [
        row
        for row in found
        if row.get("model.layers") == layers and row.get("model.top_k") == min(2, row.get("model.experts"))
    ]


def _expert_series(rows: Sequence[Row]) -> tuple[Series, ...]:
    ordered = sorted(rows, key=lambda row: int(row.get("model.experts")))
    engines = dict.fromkeys(str(row.get("engine")) for row in ordered)
    return tuple(
        Series(
            engine,
            ENGINES.get(engine, engine),
            tuple(
                Point(
                    str(row.get("model.experts")),
                    row.value("result.ms"),
                    row.value("result.percent_of_floor") if row.get("result.percent_of_floor") else None,
                )
                for row in ordered
                if row.get("engine") == engine
            ),
        )
        for engine in engines
    )


# ---------------------------------------------------------------------------------------------- the rest


def cpu_pairs(rows: Sequence[Row]) -> list[tuple[str, Row, Row]]:
    """(metric, ours as it comes, the best configuration of transformers), of the newest run on a CPU."""
    found = [row for row in rows if row.get("benchmark") == "cpu_compare_hf" and row.get("phase") == "final"]
    found = [row for row in found if row.get("median") is not None and not row.get("quick")]
    found = _like_the_last(found, ("commit", "device.cpu"))
    pairs = []
    for metric in CPU_METRICS:
        of_metric = newest([row for row in found if row.get("metric") == metric], ("engine", "config"))
        ours = [row for row in of_metric if row.get("engine") == "flexmoe" and row.get("config.dtype") == "auto"]
        theirs = [row for row in of_metric if row.get("engine") == "transformers"]
        if ours and theirs:
            pairs.append((metric, ours[0], min(theirs, key=lambda row: float(row.get("median")))))
    return pairs


def cpu(rows: Sequence[Row]) -> Figure | None:
    """Ours beside the best of transformers on a CPU, one panel a metric."""
    pairs = cpu_pairs(rows)
    if not pairs:
        return None
    panels = tuple(
        Panel(
            CPU_METRICS[metric],
            (
                Series("flexmoe", ENGINES["flexmoe"], (Point("FlexMoE", ours.value("median")),)),
                Series("hf-best", ENGINES["hf-best"], (Point("transformers", theirs.value("median")),)),
            ),
        )
        for metric, ours, theirs in pairs
    )
    first = pairs[0][1]
    about = f"built-in model, {first.get('device.cores')} cores of {short_device(str(first.get('device.cpu')))}"
    return Figure("cpu", "pairs", "", panels, f"{about}; {measured(first)}")


def operations(rows: Sequence[Row]) -> Figure | None:
    """Microseconds that each operation adds to a layer of a decode step."""
    found = newest(
        [row for row in rows if row.get("benchmark") == "step_costs" and row.get("op") in OPERATIONS],
        ("model", "batch", "op"),
    )
    if not found:
        return None
    bars = sorted({(str(row.get("model")), int(row.get("batch"))) for row in found})
    series = tuple(
        Series(
            op,
            label,
            tuple(
                Point(f"{MODELS.get(model, model)}, batch {batch}", row.value("added_us"))
                for model, batch in bars
                for row in found
                if (row.get("op"), row.get("model"), row.get("batch")) == (op, model, batch)
            ),
        )
        for op, label in OPERATIONS.items()
    )
    about = f"{found[0].get('device.name')}, bf16, {found[0].get('layers')} layers in a graph; {measured(found[0])}"
    return Figure("operations", "stack", "µs a layer", (Panel("", series),), about)


def profiled(rows: Sequence[Row]) -> Figure | None:
    """Microseconds of each operation of a decode step, as `flexmoe profile` saw them: the newest model."""
    found = [row for row in rows if row.get("benchmark") == "profile"]
    found = newest(_like_the_last(found, ("model.label", "device.name")), ("params.batch", "params.torch_path"))
    if not found:
        return None
    bars = {f"batch {row.get('params.batch')}": row for row in found}
    names = [one["operation"] for row in bars.values() for one in row.get("result.operations")]
    series = []
    for name in dict.fromkeys(names):
        points = tuple(
            Point(bar, row.value(f"result.operations.{place}.us"))
            for bar, row in bars.items()
            for place, one in enumerate(row.get("result.operations"))
            if one["operation"] == name
        )
        series.append(Series(name, name, points))
    last = found[-1]
    about = f"{last.get('model.label')}, {last.get('params.dtype')} on {short_device(str(last.get('device.name')))}"
    return Figure("profiled", "stack", "µs a step", (Panel("", tuple(series)),), f"{about}; {measured(last)}")


def throughput_rows(rows: Sequence[Row], *, larger: bool = False) -> list[Row]:
    """Our engine's, as it comes: the newest of each model on the last one's device, under the last one's load.

    larger: also those whose steps were asked to have more tokens than the engine would give them.
    """
    found = [row for row in rows if row.get("benchmark") == "throughput" and row.get("result.output_tokens_per_s")]
    found = [row for row in found if row.get("engine") == "flexmoe" and not row.is_cited]
    found = [row for row in found if not row.get("config.one_pass")]
    found = [row for row in found if larger or row.get(_STEPS) is None]
    load = ("device.name", "params.requests", "params.prompt_len", "params.output_len")
    return newest(_like_the_last(found, load), ("model.label", _STEPS))


def throughput(rows: Sequence[Row]) -> Figure | None:
    """Output tokens a second of many requests at once, without a server, beside others under the same load."""
    ours = throughput_rows(rows)
    if not ours:
        return None
    same = ("model.label", "device.name", "params.requests", "params.prompt_len", "params.output_len")
    panels = []
    for row in sorted(ours, key=lambda row: -row.get("model.parameters"))[:_MOST_PANELS]:
        others = [one for one in rows if one.get("benchmark") == "throughput" and one.get("engine") != "flexmoe"]
        others = newest([one for one in others if all(one.get(k) == row.get(k) for k in same)], ("engine",))
        shown = [row, *(one for one in others if one.get("result.output_tokens_per_s"))]
        points = tuple(Point(_who(one), one.value("result.output_tokens_per_s")) for one in shown)
        panels.append(Panel(model_name(row), (Series("flexmoe", "tokens a second", points),)))
    first = ours[-1]
    about = f"output tokens a second, {first.get('params.requests')} requests of {first.get('params.prompt_len')}"
    about += f" + {first.get('params.output_len')} tokens on {short_device(str(first.get('device.name')))}"
    return Figure("throughput", "bars", "", tuple(panels), f"{about}; {measured(first)}")


def served(rows: Sequence[Row]) -> Figure | None:
    """A server under load, by streams at once: the newest model."""
    found = [row for row in rows if row.get("benchmark") == "serve" and row.get("result.tpot_ms.p50")]
    found = [row for row in found if row.get("params.concurrency") and not row.get("note")]  # of nothing special
    found = newest(
        _like_the_last(found, ("model.name", "params.input_len", "params.output_len")), ("engine", "params.concurrency")
    )
    if not found:
        return None
    shown = {
        "result.output_tokens_per_s": "tokens a second",
        "result.ttft_ms.p50": "first token, ms",
        "result.tpot_ms.p50": "a token, ms",
    }
    panels = bar_panels(found, shown, lambda row: f"{_who(row)}, {row.get('params.concurrency')} streams")
    name = str(found[-1].get("model.name"))
    words = f"{MODELS.get(name, name)} through HTTP, medians; {measured(found[-1])}"
    return Figure("served", "bars", "", panels, words)


def _like_the_last(rows: Sequence[Row], keys: Sequence[str]) -> list[Row]:
    return [row for row in rows if all(row.get(key) == rows[-1].get(key) for key in keys)]


def _who(row: Row) -> str:
    engine = str(row.get("engine"))
    return ENGINES.get(engine, engine)
