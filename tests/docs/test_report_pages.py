"""Poster, report and docs/performance.md as built from the committed rows: every number is that of a row."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from matplotlib.patches import Rectangle
from pypdf import PdfReader

from flexmoe.errors import ConfigError
from flexmoe.report.build import build, description
from flexmoe.report.charts import figures, latency
from flexmoe.report.draw import draw
from flexmoe.report.figure import Figure
from flexmoe.report.rows import Cell, cell_number
from flexmoe.report.table import MISSING
from tests.docs.snippets import ROOT
from tools.performance_page import PICTURE, main, recorded

FILES = sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))
A0, A4 = (841, 1189), (210, 297)
MOST_PICTURE_BYTES = 200_000


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        build(FILES, folder)
    return folder


@pytest.fixture(scope="module")
def shown() -> list[Figure]:
    return figures(recorded())


def test_every_number_is_that_of_its_cells(built: Path) -> None:
    entries = json.loads((built / "sources.json").read_text())
    assert len(entries) > 200
    for entry in entries:
        numbers = [cell_number(Cell(**cell), ROOT) for cell in entry["cells"]]
        assert re.fullmatch(r"[ab\d */().]+", entry["formula"]), entry["where"]
        assert entry["value"] == eval(entry["formula"], dict(zip("ab", numbers, strict=False))), entry["where"]


def test_what_is_drawn_is_what_the_figures_say(shown: list[Figure]) -> None:
    """Heights, widths and points of the artists themselves, in no order."""
    mpl.use("Agg")
    assert {figure.name for figure in shown} >= {"latency", "experts", "cpu", "strategies", "spread", "operations"}
    for figure in shown:
        canvas = draw(figure)
        for axes, panel in zip(canvas.axes, figure.panels, strict=True):
            numbers = sorted(point.value.number for one in panel.series for point in one.points)
            assert drawn(axes, figure.kind) == pytest.approx(numbers), f"{figure.name}: {panel.title}"
        plt.close(canvas)


def drawn(axes: Any, kind: str) -> list[float]:
    bars = [part for part in axes.patches if isinstance(part, Rectangle)]
    sizes = [bar.get_width() if kind in ("bars", "stack") else bar.get_height() for bar in bars]
    lines = [list(line.get_ydata()) for line in axes.lines if kind != "spread"]  # its line is 1, one GPU
    # The floor of a batch size is a level line: one number, however long.
    return sorted(sizes + [float(y) for line in lines for y in (line[:1] if kind == "latency" else line)])


@pytest.mark.parametrize(("name", "pages", "size"), [("poster", 1, A0), ("report", 11, A4)])
def test_pages_are_as_many_as_expected_with_all_fonts_inside(
    built: Path, name: str, pages: int, size: tuple[int, int]
) -> None:
    pdf = PdfReader(built / f"{name}.pdf")
    assert len(pdf.pages) == pages
    for page in pdf.pages:
        assert (round(float(page.mediabox.width) * 25.4 / 72), round(float(page.mediabox.height) * 25.4 / 72)) == size
        found = list(fonts(page))
        assert found
        for font in found:
            assert {"/FontFile", "/FontFile2", "/FontFile3"} & font["/FontDescriptor"].keys(), font
            assert re.search("SourceSansPro|DejaVuSansMono", font["/BaseFont"]), font["/BaseFont"]
        assert "\ufffd" not in page.extract_text()
        assert MISSING not in page.extract_text()


def fonts(page: Any) -> Any:
    for font in page["/Resources"]["/Font"].values():
        font = font.get_object()
        yield from (inner.get_object() for inner in font.get("/DescendantFonts", [font]))


def test_figures_are_there_as_svg_and_png(built: Path, shown: list[Figure]) -> None:
    names = {path.name for path in (built / "figures").iterdir()}
    assert names == {f"{figure.name}.{kind}" for figure in shown for kind in ("svg", "png")}
    for figure in shown:
        assert description(figure) in (built / "figures" / f"{figure.name}.svg").read_text()


def test_rows_of_a_user_alone_make_a_poster(tmp_path: Path) -> None:
    """As `flexmoe bench latency` on a CPU writes them: nothing of a GPU, no other engine."""
    line = next(one for one in FILES if one.name == "h200_latency.jsonl").read_text().splitlines()[0]
    mine = json.loads(line) | {"device": {"kind": "cpu", "name": "A Processor", "cores": 2}}
    (tmp_path / "mine.jsonl").write_text(json.dumps(mine) + "\n")
    build([tmp_path / "mine.jsonl"], tmp_path / "out")
    assert len(PdfReader(tmp_path / "out" / "poster.pdf").pages) == 1
    assert [path.name for path in sorted((tmp_path / "out" / "figures").iterdir())] == ["latency.png", "latency.svg"]


def test_rows_that_no_figure_knows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"benchmark": "other"}\n')
    with pytest.raises(ConfigError, match="no row that a figure knows"):
        build([tmp_path / "other.jsonl"], tmp_path / "out")


def test_the_page_of_figures_is_current() -> None:
    assert main(["--check"]) == 0


def test_the_picture_shows_the_newest_rows_and_is_small() -> None:
    figure = latency(recorded())
    assert figure is not None
    assert description(figure) in PICTURE.read_text(encoding="utf-8")
    assert PICTURE.stat().st_size < MOST_PICTURE_BYTES
