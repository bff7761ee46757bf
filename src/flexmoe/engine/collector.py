"""Python's collector of garbage beside an engine, in processes that exist for it.

A full collection looks through every object of torch and the engine, 240,000 of them, and halts all streams meanwhile:
160 ms on a CPU of two cores, 3 ms where the objects of the start are left out (benchmarks/LOG.md).
"""

from __future__ import annotations

import gc


def leave_out() -> None:
    """What lives by now is not looked through again. For when a model is loaded."""
    gc.collect()
    gc.freeze()


def take_in() -> None:
    """Everything is looked through again, now and from now on. For when a model is let go."""
    gc.unfreeze()
    gc.collect()
