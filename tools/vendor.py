"""Fetch the page's libraries from npm. Enters: the pins below. Leaves: files in static/vendor, licences included.

Users need neither this nor npm: the files are committed. Run it after changing a pin, and commit what it wrote.
Each library becomes an ES module: `export` is the line that its file lacks for that.
"""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

TARGET = Path(__file__).parent.parent / "src/flexmoe/server/static/vendor"


@dataclass(frozen=True)
class Library:
    """A package of npm: its file for browsers, and what that is called here."""

    package: str
    version: str
    file: str
    name: str
    export: str = ""
    licence: str = "LICENSE"


LIBRARIES = (
    Library("marked", "18.2.1", "lib/marked.esm.js", "marked.js"),
    Library("dompurify", "3.5.0", "dist/purify.min.js", "purify.js", "export default globalThis.DOMPurify;"),
    Library("uplot", "1.6.32", "dist/uPlot.iife.min.js", "uplot.js", "export default uPlot;"),
    Library("uplot", "1.6.32", "dist/uPlot.min.css", "uplot.css"),
)


def main() -> None:
    """Write all of them."""
    TARGET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pins = sorted({f"{library.package}@{library.version}" for library in LIBRARIES})
        command = ["npm", "install", "--silent", "--ignore-scripts", "--no-package-lock", "--prefix", folder, *pins]
        subprocess.run(command, check=True)
        for library in LIBRARIES:
            write(library, Path(folder) / "node_modules" / library.package)


def write(library: Library, source: Path) -> None:
    """One file and its licence."""
    lines = (source / library.file).read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith("//# sourceMappingURL")]
    text = "\n".join([*kept, *([library.export] if library.export else [])]) + "\n"
    (TARGET / library.name).write_text(text, encoding="utf-8")
    licence = (source / library.licence).read_text(encoding="utf-8")
    (TARGET / f"LICENSE.{library.package}").write_text(licence, encoding="utf-8")


if __name__ == "__main__":
    main()
