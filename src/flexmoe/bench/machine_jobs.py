"""Measurements one after the other until the time is over. Enters: jobs, the most telling first. Leaves: samples."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch

from flexmoe.config.machine import Sample

Job = tuple[str, Callable[[], list[Sample]]]  # what it measures, for the reader; and how
Notify = Callable[[str], None]
Made = TypeVar("Made")


class Lazy(Generic[Made]):
    """Made at the first call, and forgotten by whoever forgets this: one model at a time is in memory."""

    def __init__(self, make: Callable[[], Made]) -> None:
        self._make = make
        self._made: list[Made] = []

    def __call__(self) -> Made:
        if not self._made:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._made.append(self._make())
        return self._made[0]


def run_jobs(jobs: Iterable[Job], seconds: float, notify: Notify) -> list[Sample]:
    """What the jobs found that began within the time. One that fails is told, and adds nothing."""
    end, found = time.monotonic() + seconds, list[Sample]()
    for what, job in jobs:
        if time.monotonic() > end:
            notify(f"no time is left for {what} and what comes after it")
            break
        notify(what)
        try:
            found += job()
        except Exception as error:  # noqa: BLE001 - a shape that cannot be computed here is told, and missing
            notify(f"{what} failed: {type(error).__name__}: {error}".splitlines()[0])
    return found
