"""The engine's own recordings. Enters: the reference's answers. Leaves: what the engine computed for the same tokens.

Once at a stroke, as a prefill of prompt and answer; once as it serves them, a prefill and then step by step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.engine.outputs import RequestOutput
from flexmoe.layers.forward_batch import ForwardBatch
from flexmoe.llm import LLM
from flexmoe.models.decoder import Decoder
from flexmoe.moe.router import Router
from flexmoe.verify.recording import Recording
from flexmoe.verify.reference import Answer
from flexmoe.verify.scenarios import first_difference, generate, use_scheduler


@dataclass(frozen=True, slots=True)
class Pass:
    """What the engine computed for one answer's sequence.

    choices: the experts [rows, K] that each layer's router chose by itself. rows: leading positions whose input, and
    whose experts, were the reference's; what follows cannot be compared. logits, wanted [n, V]: both sides'.
    """

    answer: Answer
    recording: Recording
    choices: dict[int, Tensor]
    rows: int
    logits: Tensor
    wanted: Tensor


def at_a_stroke(llm: LLM, answer: Answer, tie: float) -> Pass:
    """The whole sequence as one prefill, with the logits of all positions.

    Where the engine's router chose otherwise than the reference's, but the experts were as good as equal (router
    logits at most `tie` apart), it is made to take the reference's choice: all that follows stays comparable. On a CPU
    torch computes this pass, whose routers can be told; the C kernels are seen step by step.
    """
    use_scheduler(llm, [answer.sequence], max_tokens=1)
    model = llm.engine.local_runner.model
    choices: dict[int, Tensor] = {}
    with _replayed(model, answer.recording, tie, choices):
        recording, _ = recorded(llm, answer.sequence, max_tokens=1)
    logits = all_logits(model, recording["layer", llm.config.num_layers - 1])
    return Pass(answer, recording, choices, len(answer.sequence), logits, answer.recording["logits", -1])


def step_by_step(llm: LLM, answer: Answer, tie: float) -> Pass:
    """The prompt as a prefill, then the engine's own tokens one at a time, up to the first that is another."""
    use_scheduler(llm, [answer.prompt], max_tokens=len(answer.tokens))
    recording, output = recorded(llm, answer.prompt, max_tokens=len(answer.tokens))
    difference = first_difference(0, answer, output.token_ids)
    rows = len(answer.sequence) if difference is None else len(answer.prompt) + difference.position
    choices = {layer: recording["topk_ids", layer] for stage, layer in recording if stage == "topk_ids"}
    for layer, ids in choices.items():
        gaps = choice_gaps(ids[:rows], answer.recording, layer)
        tied = ((gaps > 0) & (gaps <= tie)).nonzero()
        rows = int(tied[0]) if len(tied) else rows
    num_logits = max(0, rows - len(answer.prompt) + 1)
    return Pass(answer, recording, choices, rows, recording["logits", -1][:num_logits], answer.logits[:num_logits])


def choice_gaps(ids: Tensor, reference: Recording, layer: int) -> Tensor:
    """How far each row's experts `ids` [T, K] are from the reference's, in its router logits. Leaves [T].

    0 where both chose the same; else the distance from the best expert left out to the worst taken instead.
    """
    rows = len(ids)
    logits = reference["router_logits", layer][:rows].to(ids.device)
    ours = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    theirs = torch.zeros_like(ours).scatter(1, reference["topk_ids", layer][:rows].to(ids.device), True)
    left_out = logits.masked_fill(~(theirs & ~ours), -torch.inf).amax(1)
    instead = logits.masked_fill(~(ours & ~theirs), torch.inf).amin(1)
    # At least a hair, so that an exact tie still counts as another choice.
    return torch.where((ours != theirs).any(1), (left_out - instead).clamp_min(1e-12), 0.0)


def recorded(llm: LLM, prompt: tuple[int, ...], max_tokens: int) -> tuple[Recording, RequestOutput]:
    """Every stage of one request's steps, and its output."""
    recording = Recording()
    llm.engine.local_runner.probe = recording
    try:
        (output,) = generate(llm, [prompt], max_tokens)
    finally:
        llm.engine.local_runner.probe = None
    return recording, output


@torch.inference_mode()
def all_logits(model: Decoder, hidden: Tensor) -> Tensor:
    """[T, V] from the last layer's output [T, H]; the engine itself computes them for the last position alone."""
    weight = model.norm.weight
    none = torch.empty(0, dtype=torch.int64, device=weight.device)
    every_row = ForwardBatch(none, none, none, {}, sample_rows=None)
    return model.logits(model.norm(hidden.to(weight)), every_row).float().cpu()


@contextmanager
def _replayed(model: Decoder, reference: Recording, tie: float, choices: dict[int, Tensor]) -> Iterator[None]:
    """Let every router choose, note what it chose in `choices`, and replace ties by the reference's choice."""
    layers: Any = model.layers
    handles = [
        layer.moe.router.register_forward_hook(_replay(reference, index, tie, choices))
        for index, layer in enumerate(layers)
        if layer.moe is not None and ("topk_ids", index) in reference
    ]
    native, model.native = model.native, None
    try:
        yield
    finally:
        model.native = native
        for handle in handles:
            handle.remove()


def _replay(reference: Recording, layer: int, tie: float, choices: dict[int, Tensor]) -> Any:
    def hook(router: Router, args: tuple[Tensor], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        ids, weights = output
        choices[layer] = ids.cpu()
        gaps = choice_gaps(ids, reference, layer)
        ties = ((gaps > 0) & (gaps <= tie))[:, None]
        wanted = reference["topk_ids", layer].to(ids.device)
        return torch.where(ties, wanted, ids), torch.where(ties, _weights(router, args[0], wanted), weights)

    return hook


def _weights(router: Router, x: Tensor, ids: Tensor) -> Tensor:
    """The weights [T, K] that the engine's router gives to the experts `ids`."""
    weights = F.linear(x.float(), router.weight).softmax(-1).gather(1, ids)
    return weights / weights.sum(-1, keepdim=True) if router.renormalize else weights
