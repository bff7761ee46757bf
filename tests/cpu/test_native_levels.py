"""The C kernels for each instruction set: near the torch layers, no instruction too many, and the right one chosen."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from flexmoe import LLM
from flexmoe.config.engine import ISAS
from flexmoe.config.model import LayerConfig
from flexmoe.errors import ConfigError
from flexmoe.kernels.cpu import levels, library
from tests.cpu.nearness import error
from tests.cpu.paging import scattered
from tests.cpu.test_native_decode import check
from tests.cpu.tiny_decoders import NEEDS_COMPILER, by_c, config, copy_cache, decoder, filled_cache

ROOT = Path(__file__).parents[2]
every_level = pytest.mark.parametrize("level", levels.available(), ids=lambda level: level.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Sizes that fill vectors and others that do not.
CONFIG = config(
    {"num_heads": 6, "head_dim": 48, "qk_norm": "full"},
    {"num_experts": 7, "top_k": 3, "expert_width": 21, "shared_width": 19},
    hidden_size=67, layers=(LayerConfig(is_moe=True), LayerConfig(is_moe=False, window=9)),
)  # fmt: skip
LENGTHS = [30, 1, 7, 16, 5, 90, 2, 33, 12, 64, 3]
NEAR = {torch.float32: 1e-4, torch.bfloat16: 1e-3}


@NEEDS_COMPILER
@dtypes
@every_level
def test_each_level_agrees_with_torch(level: levels.Level, dtype: torch.dtype) -> None:
    check(decoder(CONFIG, dtype, 2, level.name), LENGTHS, block_size=4)


@NEEDS_COMPILER
@dtypes
@every_level
def test_each_level_gives_a_row_the_same_bits_alone(level: levels.Level, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    model = decoder(CONFIG, dtype, 3, level.name)
    requests, num_blocks = scattered(LENGTHS, 4, model.config.vocab_size)
    cache = filled_cache(model.config, requests, num_blocks, 4, dtype)
    alone = torch.cat([by_c(model, [r], copy_cache(cache, dtype)) for r in requests])
    for count in (2, 3, 4, 7, 8, 9, 11):
        assert torch.equal(by_c(model, requests[:count], copy_cache(cache, dtype)), alone[:count])


@NEEDS_COMPILER
@dtypes
def test_levels_differ_by_rounding_only(dtype: torch.dtype) -> None:
    rows = []
    for level in levels.available():
        torch.manual_seed(7)
        model = decoder(CONFIG, dtype, 1, level.name)
        requests, num_blocks = scattered(LENGTHS, 4, model.config.vocab_size)
        rows.append(by_c(model, requests, filled_cache(model.config, requests, num_blocks, 4, dtype)))
    assert all(error(row, rows[0]) < NEAR[dtype] for row in rows)


@NEEDS_COMPILER
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.parametrize(
    ("name", "beyond"),
    [
        ("portable", r"%[yz]mm|\bv[a-z]+ .*%xmm"),
        ("avx2", r"%zmm|%[xy]mm(1[6-9]|[23]\d)|\{%k"),
        ("avx512", r"\bv(dpbf16|cvtne|pdpb)"),
    ],
)
def test_no_level_has_instructions_beyond_its_own(name: str, beyond: str) -> None:
    """A processor of that level would stop at them; this one may have them all."""
    if name not in [level.name for level in levels.available()]:
        pytest.skip(f"no level {name} here")
    native = library.load(name)
    assert native.library is not None, native.reason
    code = subprocess.run(["objdump", "-d", native.library._name], capture_output=True, text=True, check=True).stdout
    assert "%xmm" in code
    assert not re.search(beyond, code)


@pytest.mark.parametrize(
    ("machine", "has", "best"),
    [
        ("x86_64", {"sse2"}, "portable"),
        ("AMD64", {"sse2", "avx2", "fma"}, "portable"),
        ("x86_64", levels._AVX2, "avx2"),
        ("x86_64", {*levels._AVX2, *levels._AVX512} - {"avx512vl"}, "avx2"),
        ("x86_64", {*levels._AVX2, *levels._AVX512, "amx_tile"}, "avx512"),
        ("x86_64", {*levels._AVX2, *levels._AVX512, "avx512_bf16"}, "avx512"),
        ("x86_64", {*levels._AVX2, *levels._AVX512, "avx512_vnni", "avx512_bf16"}, "avx512_bf16"),
        ("aarch64", {"fp", "asimd"}, "neon"),
        ("arm64", set(), "neon"),
        ("riscv64", set(), "portable"),
    ],
)
def test_the_best_level_that_a_processor_has(
    machine: str, has: set[str], best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levels.platform, "machine", lambda: machine)
    monkeypatch.setattr(levels, "features", lambda: frozenset(has))
    assert library.choose().name == best
    for name in {level.name for level in levels.of_machine()} - {level.name for level in levels.available()}:
        with pytest.raises(ConfigError, match=rf"isa='{name}' is not what this processor can run; use one of auto, "):
            library.choose(name)


def test_every_level_can_be_asked_for() -> None:
    names = {level.name for machine in levels.LEVELS.values() for level in machine}
    assert names | {"auto"} == set(ISAS)


@NEEDS_COMPILER
def test_an_engine_runs_at_the_level_asked_for() -> None:
    tokens = []
    for name in ("auto", *(level.name for level in levels.available())):
        with LLM(threads=1, dtype="float32", isa=name) as llm:
            assert llm.describe()["decode_kernels"] == f"C ({library.choose(name).name})"
            tokens.append(llm.generate("Once upon a time")[0].token_ids)
    assert all(answer == tokens[0] for answer in tokens)


def test_an_engine_refuses_a_level_that_is_not_here() -> None:
    absent = next(name for name in ISAS[1:] if name not in [level.name for level in levels.available()])
    with pytest.raises(ConfigError, match=f"isa='{absent}'"):
        LLM(isa=absent)


@NEEDS_COMPILER
@pytest.mark.skipif(sys.platform != "linux", reason="wheels hold the kernels on Linux")
def test_a_wheel_holds_every_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built as pip does; the libraries in it are taken without a compiler."""
    sources = tmp_path / "sources"
    for name in ("src/flexmoe/kernels", "tools"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "src/flexmoe/__init__.py"):
        shutil.copy(ROOT / name, sources / name)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=sources, check=True)
    (wheel,) = (sources / "dist").glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    monkeypatch.setattr(library, "_FOLDER", tmp_path / "site/flexmoe/kernels/cpu")
    monkeypatch.setattr(library, "find_compiler", lambda: None)
    library.load.cache_clear()
    try:
        for level in levels.available():
            native = library.load(level.name)
            assert native.library is not None
            assert native.library._name == str(tmp_path / f"site/flexmoe/kernels/cpu/built/{level.name}.so")
            assert native.library.fm_step
    finally:
        library.load.cache_clear()


def test_without_a_compiler_the_wheel_is_pure(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(ROOT / "tools", sources / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "src/flexmoe/__init__.py"):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, sources / name)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    result = subprocess.run(
        command, cwd=sources, check=True, env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    (wheel,) = (sources / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "no C compiler" in result.stdout + result.stderr
