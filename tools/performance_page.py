"""Write docs/performance.md and its picture from the recorded rows, so that they cannot drift from them.

Enters: benchmarks/results/*.jsonl and the cited figures. Leaves: the page and docs/images/latency.svg; or, with
--check, exit status 1 where the page is not what the rows say.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from flexmoe.report.build import draw_all, font_folder
from flexmoe.report.charts import latency
from flexmoe.report.rows import CITED, Row, read_rows
from flexmoe.report.table import markdown
from flexmoe.report.tables import tables

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "images" / "latency.svg"
HEADER = """# Performance

<!-- Written by `make performance-docs` from benchmarks/results/*.jsonl: append rows, do not change this page. -->

Every decode step stands beside its floor: the time to read the bytes that it must read, with the experts that were
really chosen, at the speed at which a plain stream was read on the same device. 100% is the roofline of memory; nothing
can be faster. A star marks percentages of rows that hold no floor: it was computed from what they do hold. Losses are
here, too. Figures marked as cited were taken elsewhere and not in the same run.
[How to measure](../benchmarks/README.md); [what was tried and what failed](../benchmarks/LOG.md).

![Milliseconds a decode step beside the roofline, for three models and four batch sizes](images/latency.svg)
"""
FOOTER = """## Your own

```bash no-run
flexmoe bench latency olmoe-1b-7b --engine flexmoe,hf-default --out rows.jsonl
flexmoe report --rows rows.jsonl --out my-report
```

The second makes a poster, a report and figures of what the first measured (`pip install '.[report]'`).
"""


def recorded() -> list[Row]:
    """All rows of this checkout, cited ones included."""
    return read_rows([*sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")), CITED], root=ROOT)


def render(rows: list[Row]) -> str:
    """The whole page."""
    sections = [f"## {table.title}\n\n{markdown(table)}" for table in tables(rows)]
    return "\n".join([HEADER, *sections, FOOTER])


def draw(rows: list[Row]) -> None:
    """Write the picture."""
    figure = latency(rows)
    assert figure is not None
    with tempfile.TemporaryDirectory() as folder:
        svg, _ = draw_all([figure], Path(folder), font_folder())
        PICTURE.parent.mkdir(exist_ok=True)
        shutil.copy(svg, PICTURE)


def main(arguments: list[str] | None = None) -> int:
    """Write or check; return the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/performance.md and its picture.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is stale")
    rows = recorded()
    page = render(rows)
    if not parser.parse_args(arguments).check:
        PAGE.write_text(page, encoding="utf-8")
        draw(rows)
        return 0
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    print("docs/performance.md is not what the rows say; write it anew with `make performance-docs`.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
