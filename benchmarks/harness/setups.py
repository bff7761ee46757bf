"""What is asked, and of which configuration. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Load:
    """What is asked of an engine.

    figure: "tpot", ms a token after the first; "ttft", ms to the first; or "rate", all tokens a second.
    """

    metric: str
    batch: int
    prompt: int
    new: int
    figure: str

    def value(self, call: dict[str, Any]) -> float:
        """The figure of one call."""
        if self.figure == "rate":
            return self.batch * self.new / float(call["total"])
        if self.figure == "ttft":
            return float(call["first"]) * 1e3
        return float(call["total"] - call["first"]) / (self.new - 1) * 1e3

    @property
    def unit(self) -> str:
        return "tokens/s" if self.figure == "rate" else "ms"


@dataclass(frozen=True)
class Setup:
    """One configuration of one engine. Those that differ in `cache` and `compile` alone share a worker."""

    kind: str
    dtype: str
    experts: str = ""
    cache: str = ""
    compile: str | None = None

    @property
    def worker_key(self) -> tuple[str, str, str]:
        return self.kind, self.dtype, self.experts

    @property
    def variant(self) -> dict[str, Any]:
        return {"cache": self.cache, "compile": self.compile}

    @property
    def ours(self) -> bool:
        return self.kind == "flexmoe"

    def __str__(self) -> str:
        """Short enough for a column of a table."""
        words = [self.kind, _SHORT.get(self.dtype, self.dtype), self.experts.removesuffix("_mm"), self.cache]
        compiled = {None: "", "default": "compiled"}.get(self.compile, "max-autotune")
        return " ".join(filter(None, [*words, compiled]))


_SHORT = {"float32": "fp32", "bfloat16": "bf16"}
OURS = [Setup("flexmoe", dtype) for dtype in ("auto", "float32", "bfloat16")]
# Answers are compared with those of the plainest configuration in fp32.
REFERENCE = Setup("transformers", "float32", "eager", "dynamic")


def loads(quick: bool) -> list[Load]:
    """Decode of one and of eight, and prefill."""
    new = 16 if quick else 64
    return [
        Load("decode_bs1", 1, 64, new, "tpot"),
        Load("decode_bs8", 8, 64, new, "tpot"),
        Load("prefill_512", 1, 512, 1, "ttft"),
    ]


def transformers_setups(quick: bool, max_autotune: bool) -> list[Setup]:
    """Number format x expert implementation x cache x compilation. quick: a few that cross all kinds."""
    if quick:
        return [
            REFERENCE,
            Setup("transformers", "bfloat16", "grouped_mm", "static"),
            Setup("transformers", "bfloat16", "batched_mm", "static", "default"),
        ]
    modes = ["default", *(["max-autotune-no-cudagraphs"] if max_autotune else [])]
    ways = [("dynamic", None), ("static", None), *(("static", mode) for mode in modes)]
    return [
        Setup("transformers", dtype, experts, cache, mode)
        for dtype in ("float32", "bfloat16")
        for experts in ("eager", "grouped_mm", "batched_mm")
        for cache, mode in ways
    ]
