"""What of the kernels for Hopper can be known without one: that they compile as meant, and when they are chosen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from flexmoe.errors import FlexMoEError
from flexmoe.kernels.hopper import compiler, driver, products
from flexmoe.models.presets import PRESETS

HOPPER = (9, 0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "flexmoe"


# In fp16 another instruction takes the place of one: a look at one kernel is enough, each takes seconds to compile.
COMPILED = [(part, torch.bfloat16) for part in products.PARTS] + [(products.PARTS[-1], torch.float16)]


@pytest.mark.parametrize(("part", "dtype"), COMPILED, ids=str)
def test_no_register_is_spilled_and_products_overlap(part: products.Part, dtype: torch.dtype) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    text, macros = products.source(part, dtype)
    options = [*compiler.options_for(macros, HOPPER), "--ptxas-options=-v"]
    cubin, said = compiler.compile_now("products", text, options)
    assert cubin.startswith(b"\x7fELF")
    assert "Potential Performance Loss" not in said
    assert re.search(r"(?<!\d)0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", said), said
    assert "error" not in said
    assert "warning" not in said


def test_what_was_compiled_is_kept_and_a_damaged_file_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    compiled = []

    def compile_now(name: str, source: str, options: list[str]) -> tuple[bytes, str]:
        compiled.append(source)
        return source.encode(), ""

    monkeypatch.setattr(compiler, "compile_now", compile_now)
    for text in ("one", "one", "two"):
        assert compiler.compiled("kernel", text, {"A": 1}, HOPPER) == text.encode()
    assert compiled == ["one", "two"]
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    assert compiler.compiled("kernel", "one", {"A": 1}, HOPPER) == b"one"
    compiler.compiled("kernel", "one", {"A": 2}, HOPPER)
    assert compiled == ["one", "two", "one", "one"]


def test_a_folder_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    (tmp_path / "flexmoe").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiler, "compile_now", lambda *_: (b"code", ""))
    assert compiler.compiled("kernel", "text", {}, HOPPER) == b"code"


def test_the_compilers_words_are_told() -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    with pytest.raises(FlexMoEError, match=r"NVRTC could not compile kernel: .*no_such_type"):
        compiler.compile_now("kernel", "no_such_type x;", compiler.options_for({}, HOPPER))


@pytest.mark.parametrize(
    ("capability", "dtype", "slots", "hidden", "width", "reason"),
    [
        ((8, 0), torch.bfloat16, 8, 64, 64, "Hopper"),
        ((10, 0), torch.bfloat16, 8, 64, 64, "Hopper"),
        (HOPPER, torch.float32, 8, 64, 64, "not in float32"),
        (HOPPER, torch.bfloat16, 513, 64, 64, "512 experts a GPU at most, not 513"),
        (HOPPER, torch.bfloat16, 8, 60, 64, "hidden_size=60"),
        (HOPPER, torch.float16, 8, 64, 68, "width=68"),
    ],
)
def test_whom_they_do_not_serve(
    capability: tuple[int, int], dtype: torch.dtype, slots: int, hidden: int, width: int, reason: str
) -> None:
    assert reason in products.why_no_products(capability, dtype, slots, hidden, width)


def test_without_the_bindings_that_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda _: None)
    assert "cuda-bindings" in products.why_no_products(HOPPER, torch.bfloat16, 8, 64, 64)


def test_they_are_for_steps_with_dozens_of_rows_an_expert() -> None:
    pytest.importorskip("triton")
    from flexmoe.kernels.triton.tiles import TileTable
    from flexmoe.models.fused_tiles import StepTiles

    class Products(products.ExpertProducts):
        def __init__(self) -> None:
            pass

    some = Products()
    for preset, least in (("mixtral-8x7b", 256), ("olmoe-1b-7b", 512), ("qwen3-30b-a3b", 1024)):
        tiles = StepTiles(TileTable(), PRESETS[preset].config, torch.bfloat16, some)
        assert tiles.products(least) is some
        assert tiles.products(least - 1) is None
        of_mixtral = preset == "mixtral-8x7b"
        for rows, shape in ((128, "narrow"), (160, "wide"), (256, "square"), (280, "narrow"), (384, "wide")):
            assert tiles.down_shape(rows * least // 64) == shape
            assert tiles.gate_up_shape(rows * least // 64) == ("wide" if of_mixtral and shape == "wide" else "narrow")
        assert tiles.down_shape(320 * least // 64) == ("wide" if of_mixtral else "narrow")
        assert StepTiles(TileTable(), PRESETS[preset].config, torch.bfloat16).products(4096) is None
