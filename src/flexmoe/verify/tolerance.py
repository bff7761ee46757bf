"""How far two computations of the same model may lie apart, by number format."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits for one number format.

    hidden: largest difference of a hidden state, as a part of the largest value there (at least 1).
    logits: largest difference of a logit; of_largest: as a part of the largest logit instead of as it is.
    choice: two router logits, or two token logits, so close are a tie: either order is right.
    judge_decoding: whether free decoding is judged or only reported. Below fp32 two correct engines part at the first
    near-tie of tokens or experts, and what follows says nothing; there the verdict rests on the forward pass over
    the reference's tokens with the reference's experts.
    """

    hidden: float
    logits: float
    of_largest: bool
    choice: float
    judge_decoding: bool


# bf16: 3 to 5 times the differences seen between two correct implementations of models with 2 to 6 layers.
TOLERANCES = {
    "float32": Tolerance(hidden=1e-4, logits=1e-4, of_largest=False, choice=1e-4, judge_decoding=True),
    "bfloat16": Tolerance(hidden=0.15, logits=0.1, of_largest=True, choice=0.25, judge_decoding=False),
}
