"""Both sides' recordings, compared stage by stage. Enters: passes of the engine. Leaves: checks that name the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from flexmoe.llm import LLM
from flexmoe.verify.passes import Pass, at_a_stroke, choice_gaps, step_by_step
from flexmoe.verify.recording import Recording
from flexmoe.verify.reference import Answer
from flexmoe.verify.report import Check
from flexmoe.verify.tolerance import Tolerance


def check_layers(llm: LLM, answers: Sequence[Answer], tolerance: Tolerance) -> list[Check]:
    """Compare embedding, layers, router choices and logits: of whole sequences at a stroke, then step by step."""
    checks = _check(llm, "", at_a_stroke, answers, tolerance)
    if tolerance.judge_decoding:
        checks += _check(llm, "decoding: ", step_by_step, answers, tolerance)
    return checks


def _check(
    llm: LLM,
    prefix: str,
    run: Callable[[LLM, Answer, float], Pass],
    answers: Sequence[Answer],
    tolerance: Tolerance,
) -> list[Check]:
    passes = [run(llm, answer, tolerance.choice) for answer in answers]
    checks = [_check_hidden(f"{prefix}hidden states", passes, tolerance)]
    if llm.config.moe is not None:
        checks.append(_check_routers(f"{prefix}router choices", passes, tolerance))
    checks.append(_check_logits(f"{prefix}logits", passes, tolerance))
    return checks


def _stages(reference: Recording) -> list[tuple[str, int]]:
    """What is compared, in the order of computation."""
    layers = sorted({layer for _, layer in reference if layer >= 0})
    order = ("attention", "topk_ids", "topk_weights", "mlp", "moe", "layer")
    inside = [(stage, layer) for layer in layers for stage in order if (stage, layer) in reference]
    return [("embedding", -1), *inside]


def _check_hidden(name: str, passes: Sequence[Pass], tolerance: Tolerance) -> Check:
    """Walk all passes together through the stages; the first one beyond the limit is where the error entered."""
    worst, first = 0.0, ""
    for stage, layer in _stages(passes[0].answer.recording):
        if stage == "topk_ids":
            gap = max((float(gaps.max()) for gaps in _gaps(passes, layer)), default=0.0)
            if gap > tolerance.choice and not first:
                first = f"layer {layer} router chose other experts, {gap:.2g} apart in router logits"
            continue
        error = max(_stage_error(p, stage, layer) for p in passes)
        worst = max(worst, error)
        if error > tolerance.hidden and not first:
            first = f"{_place(stage, layer)} is off by {error:.2g}"
    detail = f"first difference: {first}" if first else ""
    return Check(name, "fail" if first else "pass", f"{worst:.1e}", f"{tolerance.hidden:g} of largest", detail)


def _place(stage: str, layer: int) -> str:
    name = {"topk_weights": "router weights", "layer": "output"}.get(stage, stage)
    return name if layer < 0 else f"layer {layer} {name}"


def _stage_error(p: Pass, stage: str, layer: int) -> float:
    """Largest difference of one stage, as a part of the largest value there or in the layer's output (at least 1).

    The engine may add a stage to the residual stream at once: then what it added is known to the stream's precision.
    """
    ours, theirs = p.recording, p.answer.recording
    if (stage, layer) not in ours:
        return float("inf")
    if stage == "topk_weights":
        return _error(_by_expert(ours, layer)[: p.rows], _by_expert(theirs, layer)[: p.rows], 1.0)
    stream = theirs["layer", layer] if layer >= 0 else theirs[stage, layer]
    scale = max(1.0, float(theirs[stage, layer].abs().max()), float(stream.abs().max()))
    return _error(ours[stage, layer][: p.rows], theirs[stage, layer][: p.rows], scale)


def _by_expert(recording: Recording, layer: int) -> Tensor:
    """Router weights [T, K] in the order of expert ids: near-equal ones may stand in either order."""
    order = recording["topk_ids", layer].argsort(-1)
    return recording["topk_weights", layer].gather(-1, order)


def _error(ours: Tensor, theirs: Tensor, scale: float) -> float:
    """Infinite for other shapes, and for NaN."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max().nan_to_num(nan=float("inf"))) / scale if len(ours) else 0.0


def _gaps(passes: Sequence[Pass], layer: int) -> Iterator[Tensor]:
    """Of each pass, how far its router's own choices are from the reference's. [rows]"""
    for p in passes:
        if layer in p.choices and p.rows:
            # The row behind the last one that is compared may be a tie: that is why it is the last.
            yield choice_gaps(p.choices[layer][: p.rows + 1], p.answer.recording, layer)


def _check_routers(name: str, passes: Sequence[Pass], tolerance: Tolerance) -> Check:
    rows = ties = 0
    worst_tie, detail = 0.0, ""
    for layer in sorted(passes[0].choices):
        for gaps in _gaps(passes, layer):
            found = gaps[gaps > 0]
            tied = found[found <= tolerance.choice]
            rows, ties = rows + len(found), ties + len(tied)
            worst_tie = max(worst_tie, float(tied.max()) if len(tied) else 0.0)
            if len(found) > len(tied) and not detail:
                detail = f"first in layer {layer}, experts {float(found.max()):.2g} apart in router logits"
    limit = f"same; tie {tolerance.choice:g}"
    if not rows:
        return Check(name, "pass", "identical", limit)
    detail = detail or f"ties are up to {worst_tie:.1e} apart in router logits"
    return Check(name, "fail" if rows > ties else "tie", f"{rows} rows differ, {ties} ties", limit, detail)


def _check_logits(name: str, passes: Sequence[Pass], tolerance: Tolerance) -> Check:
    """At all positions that can be compared."""
    worst, where, positions = 0.0, "", 0
    for number, p in enumerate(passes):
        errors = (p.logits - p.wanted).abs().amax(-1).nan_to_num(nan=float("inf"))
        if tolerance.of_largest:
            errors = errors / p.wanted.abs().max()
        positions += len(errors)
        if len(errors) and float(errors.max()) > worst:
            worst, where = float(errors.max()), f"prompt {number}, row {int(errors.argmax())}"
    failed = worst > tolerance.logits
    limit = f"{tolerance.logits:g}" + (" of largest" if tolerance.of_largest else "")
    detail = f"largest at {where} of {positions}" if failed else ""
    return Check(name, "fail" if failed else "pass", f"{worst:.1e}", limit, detail)
