"""The instruction sets that the C kernels are compiled for. Enters: this processor's features. Leaves: the best level.

One library a level, so that no instruction is met that the processor lacks. Only the standard library is imported: the
package's build loads this file by its path.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Level:
    """needs: features as Linux names them in /proc/cpuinfo. flags: what tells a compiler that it may use them."""

    name: str
    needs: frozenset[str] = frozenset()
    flags: tuple[str, ...] = ()


_AVX2 = ("avx2", "fma", "f16c", "bmi2")
_AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_BF16 = "avx512_bf16"  # compilers leave the line out
PORTABLE = Level("portable")
# Of each kind of machine, the best first. NEON is part of every 64-bit ARM processor, so there it is the portable one.
LEVELS: dict[str, tuple[Level, ...]] = {
    "x86_64": (
        Level(
            _BF16,
            frozenset((*_AVX2, *_AVX512, "avx512_vnni", _BF16)),  # all that have bf16 units have those for bytes
            (*(f"-m{name}" for name in _AVX2 + _AVX512), "-mavx512vnni", "-mavx512bf16"),
        ),
        Level("avx512", frozenset(_AVX2 + _AVX512), tuple(f"-m{name}" for name in _AVX2 + _AVX512)),
        Level("avx2", frozenset(_AVX2), tuple(f"-m{name}" for name in _AVX2)),
        PORTABLE,
    ),
    "aarch64": (Level("neon"),),
}
_SAME_MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}

# The order of sums is written down in the source and stays: no -ffast-math, which would also change the process.
# Clearing a few registers must not become a loop over memory, as GCC's pattern for memset would have it.
_FLAGS = (
    "-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread", "-fno-math-errno", "-fno-trapping-math",
    "-fno-tree-loop-distribute-patterns",
)  # fmt: skip


def of_machine(machine: str = "") -> tuple[Level, ...]:
    """The levels that libraries are made for on a kind of machine (default: this one), the best first."""
    name = (machine or platform.machine()).lower()
    return LEVELS.get(_SAME_MACHINE.get(name, name), (PORTABLE,))


def available() -> tuple[Level, ...]:
    """Those whose every instruction this processor has, and its operating system allows; the best first."""
    return tuple(level for level in of_machine() if level.needs <= features())


@functools.cache
def features() -> frozenset[str]:
    """What Linux says that the first processor can do; nothing on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    listed = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(listed.partition(":")[2].split())


def flags(level: Level) -> tuple[str, ...]:
    """All flags of the compiler but the files' names."""
    return (*_FLAGS, *level.flags)


def compile_command(compiler: str, level: Level, source: Path, target: Path) -> tuple[str, ...]:
    """How to make the library `target` from decode.c."""
    return (compiler, *flags(level), str(source), "-o", str(target), "-lm")
