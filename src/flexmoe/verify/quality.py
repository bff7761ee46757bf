"""What quantized weights cost. Enters: a model, a number of bits. Leaves: perplexity and agreement with full weights.

Both read the same text, and every position's logits are compared: as the next token is always the text's own, one early
difference does not spoil what follows. The default text was written for this purpose: no model has learnt it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.config.engine import QUANTIZATIONS
from flexmoe.errors import ConfigError, RequestError
from flexmoe.llm import LLM
from flexmoe.verify.passes import all_logits, recorded
from flexmoe.verify.scenarios import use_scheduler

TEXTS = (
    "The ferry to the island left only once a day, and Mara had missed it twice already that week. On the third "
    "morning she slept on the pier with her shoes on. When the captain saw her he laughed, threw her the rope, and "
    "said that anyone who wanted to cross so badly could help him steer. By noon she had learned to read the buoys.",
    "A lighthouse is a tower with a bright lamp at its top, built where ships need to be warned of rocks or shallow "
    "water. In the past a keeper lived there and trimmed the wick of the lamp every few hours. Today most of them work "
    "by themselves, and many have been turned into museums or small hotels.",
    "To repair a flat tyre, first take the wheel out of the frame. Lever one side of the tyre over the rim and pull "
    "out the tube. Pump air into it and listen for the leak, or hold it under water and look for bubbles. Roughen the "
    "rubber around the hole, spread the glue thinly, wait until it is dry to the touch, and press the patch on.",
)


@dataclass(frozen=True, slots=True)
class Quality:
    """tokens: how many were predicted. agreement: the share of them for which both hold the same token likeliest."""

    quantization: str
    tokens: int
    full_perplexity: float
    perplexity: float
    agreement: float

    def line(self, dtype: str) -> str:
        """One line for people; dtype: of the full weights."""
        return (
            f"{self.tokens} tokens: perplexity {self.full_perplexity:.3f} with {dtype} weights, "
            f"{self.perplexity:.3f} with {self.quantization}; the same token likeliest {self.agreement:.1%} of the time"
        )


def measure(
    model: str | None, quantization: str, texts: Sequence[str] = TEXTS, *, dtype: str = "float32",
    threads: int | None = None, revision: str | None = None,
) -> Quality:  # fmt: skip
    """Read the texts with full and with quantized weights, on the CPU.

    quantization: "int8", "int4", or a folder that `flexmoe quantize` made of the model. Raises RequestError for texts
    too short, ConfigError if the model is quantized itself or the folder is not.
    """
    options: dict[str, Any] = {"device": "cpu", "dtype": dtype, "threads": threads}
    full = options | {"model": model, "revision": revision}
    rounded = options | {"model": quantization}
    if quantization in QUANTIZATIONS:
        rounded = full | {"quantization": quantization}
    losses, likeliest = [], []
    for which in (full, rounded):
        with LLM(**which) as llm:
            _check_weights(llm, which is full)
            ids = [llm.encode(text)[: llm.config.max_position - 1] for text in texts]
            ids = [sequence for sequence in ids if len(sequence) > 1]
            if not ids:
                raise RequestError("the texts hold no second token to predict; give longer ones.")
            logits = [_logits(llm, sequence) for sequence in ids]
        total = sum(map(_loss, logits, ids))
        tokens = sum(len(sequence) - 1 for sequence in ids)
        losses.append(total / tokens)
        likeliest.append([token for z in logits for token in z.argmax(1).tolist()])
    same = sum(ours == theirs for ours, theirs in zip(*likeliest, strict=True))
    return Quality(quantization, tokens, math.exp(losses[0]), math.exp(losses[1]), same / tokens)


def _check_weights(llm: LLM, full: bool) -> None:
    about = llm.describe()
    if full and about["quantization"]:
        raise ConfigError(
            f"{about['model']} holds {about['quantization']} weights; name the full model, and this folder with "
            "--quantization."
        )
    if not full and not about["quantization"]:
        raise ConfigError(f"{about['model']} holds full weights; give int8, int4 or a folder from `flexmoe quantize`.")


def _loss(logits: Tensor, ids: list[int]) -> float:
    return float(F.cross_entropy(logits, torch.tensor(ids[1:], dtype=torch.int64), reduction="sum"))


def _logits(llm: LLM, ids: list[int]) -> Tensor:
    """Of each position but the last, [T - 1, V]."""
    use_scheduler(llm, [tuple(ids)], max_tokens=1)
    recording, _ = recorded(llm, tuple(ids), max_tokens=1)
    return all_logits(llm.engine.local_runner.model, recording["layer", llm.config.num_layers - 1])[:-1]
