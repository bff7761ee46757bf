"""Which steps of prompts are CUDA graphs on a GPU, and what they are padded to, so that few graphs serve all of them.

Enters: tokens and prompts of a step. Leaves: rows and prompts of its form. No torch: a simulation asks, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flexmoe.config.plan import ParallelPlan
from flexmoe.config.powers import power_of_two

MOST_GRAPHED = 2048  # tokens of a step that is a graph
MOST_ON_RANKS = 8192  # the same where ranks share the work: that leaves each less time, and its host as much to launch
MOST_CHUNKS = 64
# A step of so many tokens at most is padded to a multiple of the number beside it.
_STEPS = ((128, 16), (512, 64), (1024, 128), (MOST_GRAPHED, 256), (4096, 512), (MOST_ON_RANKS, 1024))


def most_graphed(num_ranks: int) -> int:
    """Tokens of a step that is a graph, at most, where so many ranks compute it."""
    return MOST_GRAPHED if num_ranks == 1 else MOST_ON_RANKS


def graphed_by(plan: ParallelPlan) -> int:
    """Tokens of a step of the plan's ranks that is a graph, at most; 0 where tokens travel: those take none."""
    return 0 if plan.moves_tokens else most_graphed(plan.num_ranks)


def graph_form(tokens: int, chunks: int, most: int = MOST_GRAPHED) -> tuple[int, int] | None:
    """Rows, and chunks, a power of two, of a step's form; None if it is too large for a graph: beyond `most` tokens."""
    if tokens > most or chunks > MOST_CHUNKS:
        return None
    multiple = next(multiple for most, multiple in _STEPS if tokens <= most)
    return -(-tokens // multiple) * multiple, power_of_two(chunks)


def forms_up_to(tokens: int, chunks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The forms of steps of so many tokens at most, those of few chunks first. chunks: powers of two, ascending."""
    for count in chunks:
        rows = 0
        while (form := graph_form(max(rows + 1, count), count)) is not None and form[0] <= tokens:
            rows = form[0]
            yield form
