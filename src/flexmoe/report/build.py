"""Make everything. Enters: rows. Leaves, in a folder: poster.pdf, report.pdf, figures/*.svg and *.png, sources.json.

sources.json tells of each number shown where it comes from: {"where", "value", "formula", "cells": [{"file", "line",
"key"}]}. A formula names its cells a, b ... in their order. Pages are set by typst, figures drawn by matplotlib; both
use the fonts of a package, so that pages look the same on every machine.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexmoe.errors import ConfigError, MissingDependencyError
from flexmoe.report import style
from flexmoe.report.charts import figures
from flexmoe.report.draw import draw, settings
from flexmoe.report.figure import Figure
from flexmoe.report.headlines import Headline, headlines
from flexmoe.report.rows import CITED, Row, Value, read_rows
from flexmoe.report.table import Table, texts
from flexmoe.report.tables import tables

PAGES = ("poster", "report")
_TEMPLATES = Path(__file__).with_name("templates")
_FONTS = "font_source_sans_pro"
_WEIGHTS = ("Regular", "Semibold", "Bold", "It")
_DPI = 110


def build(files: Sequence[Path], out: Path, notify: Callable[[str], None] = lambda _: None) -> list[Path]:
    """Write all into the folder `out`, and return what was written.

    Raises MissingDependencyError without the packages of [report], ConfigError for files without rows that it knows.
    """
    fonts = font_folder()
    rows = read_rows([*files, CITED])
    shown = figures(rows)
    if not shown:
        raise ConfigError(f"{', '.join(map(str, files))}: no row that a figure knows; make some with `flexmoe bench`.")
    found, big = tables(rows), headlines(rows)
    out.mkdir(parents=True, exist_ok=True)
    notify(f"{len(shown)} figures of {len(rows)} rows")
    written = draw_all(shown, out / "figures", fonts)
    sources = out / "sources.json"
    sources.write_text(json.dumps(list(traced(shown, found, big)), indent=1) + "\n", encoding="utf-8")
    data = page_data(rows, shown, found, big)
    for page in PAGES:
        notify(f"setting {page}.pdf")
        written.append(_set(page, data, out, fonts))
    return [*written, sources]


def font_folder() -> Path:
    """Where the fonts are, and whether the other packages are there. Raises MissingDependencyError."""
    for package in ("matplotlib", "typst", _FONTS):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "report", "`flexmoe report`")
    spec = importlib.util.find_spec(_FONTS)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "files"


def draw_all(shown: Sequence[Figure], folder: Path, fonts: Path) -> list[Path]:
    """Each figure as SVG and PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import font_manager

    for weight in _WEIGHTS:
        font_manager.fontManager.addfont(fonts / f"SourceSansPro-{weight}.ttf")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(settings()):
        for figure in shown:
            canvas = draw(figure)
            described = {"Date": None, "Description": description(figure)}
            for kind, extra in (("svg", {"metadata": described}), ("png", {"dpi": _DPI})):
                written.append(folder / f"{figure.name}.{kind}")
                canvas.savefig(written[-1], **extra)
            plt.close(canvas)
    return written


def description(figure: Figure) -> str:
    """The numbers of a figure, in order, as its SVG bears them: whoever finds one alone can tell what it shows."""
    numbers = [point.value.number for panel in figure.panels for one in panel.series for point in one.points]
    return f"{figure.name}: " + " ".join(f"{number:g}" for number in numbers)


def page_data(
    rows: Sequence[Row], shown: Sequence[Figure], found: Sequence[Table], big: Sequence[Headline]
) -> dict[str, Any]:
    """What the templates read: text only, so that no number is made there."""
    files: dict[str, int] = {}
    for row in rows:
        files[row.file] = files.get(row.file, 0) + 1
    return {
        "colours": style.COLOURS,
        "headlines": [{"big": one.big, "small": one.small} for one in big],
        "figures": {figure.name: {"file": f"figures/{figure.name}.svg", "about": figure.about} for figure in shown},
        "tables": [
            {
                "name": table.name,
                "title": table.title,
                "about": table.about,
                "header": table.header,
                "rows": texts(table),
            }
            for table in found
        ],
        "files": [f"{name} ({count})" for name, count in files.items()],
    }


def traced(shown: Sequence[Figure], found: Sequence[Table], big: Sequence[Headline]) -> Iterator[dict[str, Any]]:
    """Every number with its cells."""
    for figure in shown:
        yield from _of_figure(figure)
    for table in found:
        for number, row in enumerate(table.rows, 1):
            for name, cell in zip(table.header, row, strict=True):
                if cell.value is not None:
                    yield _traced(f"table {table.name} / row {number} / {name}", cell.value)
    for one in big:
        for value in one.values:
            yield _traced(f"headline {one.big}", value)


def _of_figure(figure: Figure) -> Iterator[dict[str, Any]]:
    for panel in figure.panels:
        for series in panel.series:
            for point in series.points:
                where = f"figure {figure.name} / {panel.title} / {series.label} / {point.x}"
                yield _traced(where, point.value)
                if point.note is not None:
                    yield _traced(f"{where} / % of floor", point.note)


def _traced(where: str, value: Value) -> dict[str, Any]:
    return {"where": where, "value": value.number, "formula": value.formula, "cells": [asdict(c) for c in value.cells]}


def _set(page: str, data: dict[str, Any], out: Path, fonts: Path) -> Path:
    """One page's PDF. typst reads only below its root, so all it needs is put together in a folder of its own."""
    import typst

    pdf = out / f"{page}.pdf"
    with tempfile.TemporaryDirectory(prefix="flexmoe-report-") as name:
        folder = Path(name)
        for template in _TEMPLATES.glob("*.typ"):
            shutil.copy(template, folder)
        shutil.copytree(out / "figures", folder / "figures")
        (folder / "data.json").write_text(json.dumps(data), encoding="utf-8")
        typst.compile(folder / f"{page}.typ", output=pdf, root=folder, font_paths=[fonts], ignore_system_fonts=True)
    return pdf
