"""The text of Hopper's kernels: instructions.h, the matrix products that it names, and a kernel's own file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}


def source(file: str, dtype: torch.dtype, **sizes: Iterable[int]) -> str:
    """A kernel's file with all that it needs. sizes: of each kind of product, by the name it has in instructions.h."""
    parts = [(_FOLDER / "instructions.h").read_text(encoding="utf-8")]
    parts += (_structure(name, n, TYPES[dtype]) for name, each in sizes.items() for n in each)
    return "\n".join((*parts, (_FOLDER / file).read_text(encoding="utf-8")))


def _structure(name: str, n: int, kind: str) -> str:
    """One instruction: its n / 2 sums a thread begin with it, or are added to."""
    return f"template <> struct {name}<{n}> {{\n{_function(name, n, kind, add=0)}{_function(name, n, kind, add=1)}}};\n"


def _function(name: str, n: int, kind: str, *, add: int) -> str:
    count = n // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    access = "+f" if add else "=f"
    outputs = ", ".join(f'"{access}"(sums[{i}])' for i in range(count))
    if name == "Product":
        left, given, inputs, transposed = "u64 left", f"%{count}, %{count + 1}", '"l"(left), "l"(right)', "0, 0"
    else:
        registers = ", ".join(f"%{count + i}" for i in range(4))
        left, given, transposed = "const u32 *left", f"{{{registers}}}, %{count + 4}", str(int(name == "Weighted"))
        inputs = ", ".join(f'"r"(left[{i}])' for i in range(4)) + ', "l"(right)'
    return (
        f"static __device__ __forceinline__ void {'add' if add else 'first'}"
        f"(float (&sums)[{count}], {left}, u64 right) {{\n"
        f'    asm volatile("{{\\n.reg .pred add;\\nsetp.ne.b32 add, {add}, 0;\\n"\n'
        f'        "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{sums}}}, {given}, "\n'
        f'        "add, 1, 1, {transposed};\\n}}" : {outputs} : {inputs});\n}}\n'
    )
