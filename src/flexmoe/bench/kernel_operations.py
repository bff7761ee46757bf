"""Which operation of a decode step a GPU kernel belongs to. Enters: kernels in the order of their start. Leaves: names.

Most are told by their name. The projections share kernels, and are told by what stands before them: the one behind
attention is the output projection, the last one before the choice of a token is the head, and all others are QKV.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_PROJECTION, _REDUCTION = "projection", "reduction"
_NAMES = (
    (r"^_gate_up|^_down|grouped_mm|cutlass.*[Gg]rouped", "experts"),
    (r"^_combine", "combine"),
    (r"^_route", "router"),
    (r"^_topk|^_group_by_expert", "dispatch"),
    (r"^split_kernel|^merge_kernel|attention|flash", "attention"),
    (r"^_rms_norm", "norms"),
    (r"^_reduce", _REDUCTION),  # adds up the splits of the projection ahead of it
    (r"^_direct|^_gemv|^_dot|gemm|cublas", _PROJECTION),
    (r"^_embed|^_begin_rows", "embedding"),
    (r"^_peaks|^_first|^_winner|sample|argmax", "sampler"),
    (r"^Mem(cpy|set)|^_fetch", "copies"),
    (r"nccl|all_?reduce|all_?gather", "collectives"),
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch as the profiler saw it; seconds from the first one's start."""

    name: str
    start: float
    seconds: float


def operations_of(kernels: Sequence[Kernel]) -> list[tuple[str, int]]:
    """(operation, layer) of each kernel; -1 is outside of layers. A layer begins with its QKV projection."""
    kinds = [_kind(kernel.name) for kernel in kernels]
    named: list[tuple[str, int]] = []
    layer, attended, last = -1, False, -1  # last: place of the latest projection
    for place, kind in enumerate(kinds):
        if kind == _PROJECTION:
            layer += not attended
            named.append(("output projection" if attended else "QKV", layer))
            attended, last = False, place
        elif kind == _REDUCTION:
            named.append(named[last] if last >= 0 else ("other", -1))
        elif kind == "sampler" and last >= 0:
            _becomes_head(named, last)
            named.append((kind, -1))
            layer, last = -1, -1
        else:
            attended = attended or kind == "attention"
            named.append((kind, -1 if kind in ("embedding", "copies", "sampler") else layer))
    return named


def _becomes_head(named: list[tuple[str, int]], last: int) -> None:
    """The projection at `last`, with the reductions that were given its name, was the language-model head."""
    was = named[last]
    for place in range(last, len(named)):
        if named[place] == was:
            named[place] = ("head", -1)


def _kind(name: str) -> str:
    return next((kind for pattern, kind in _NAMES if re.search(pattern, name)), "other")
