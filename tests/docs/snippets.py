"""Reads the fenced snippets of a Markdown page. Enters: a page's text. Leaves: snippets and the commands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    """One fenced block: its page, the line of its first line of text, the words behind the fence, and the text."""

    page: str
    line: int
    info: tuple[str, ...]
    text: str

    @property
    def language(self) -> str:
        return self.info[0] if self.info else ""

    @property
    def runs(self) -> bool:
        return not {"no-run", "server"} & set(self.info)

    def commands(self) -> list[str]:
        """Shell commands: every line of a bash block but comments, and the `$ ` lines of a console block."""
        lines = [
            line for line in self.text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")
        ]
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return lines


def pages() -> list[Path]:
    """The README and every page in docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets_of(page: Path) -> list[Snippet]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT).as_posix()
    return [
        Snippet(name, text.count("\n", 0, m.start()) + 2, tuple(m["info"].split()), m["text"])
        for m in _FENCE.finditer(text)
    ]


def snippets(*languages: str) -> list[Snippet]:
    """The fenced blocks of all pages in one of `languages`."""
    return [snippet for page in pages() for snippet in snippets_of(page) if snippet.language in languages]


def links(page: Path) -> list[str]:
    """Targets of the page's links, those in fenced blocks left out."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", text)
