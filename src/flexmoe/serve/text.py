"""OutputText: a result's text as FlexFlow gives it, bytes, that behaves as text wherever that is unambiguous."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class OutputText(bytes):
    """UTF-8 bytes of a text, for scripts that say `.decode("utf-8")`, and the text itself for those that do not.

    str(), print, f-strings and format give the text. It equals the same text and the same bytes, `in`, `+`,
    `startswith`, `find`, `split`, `replace` and the like take either kind and answer in it. What takes no argument
    of either kind (`strip()`, `[1:]`, `len`) is bytes, as in FlexFlow. Methods that only text has work on the text.
    """

    text: str

    def __new__(cls, text: str) -> OutputText:
        # A surrogate cannot come from a tokenizer; were one there, decoding must still give the text back.
        self = super().__new__(cls, text.encode("utf-8", "surrogatepass"))
        self.text = text
        return self

    def __reduce__(self) -> tuple[type[OutputText], tuple[str]]:
        return OutputText, (self.text,)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"OutputText({self.text!r})"

    def __format__(self, spec: str) -> str:
        return format(self.text, spec)

    def __eq__(self, other: object) -> bool:
        return self.text == other if isinstance(other, str) else bytes.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        """That of the bytes; as a key beside texts, use str()."""
        return bytes.__hash__(self)

    def __contains__(self, part: Any) -> bool:
        return part in self.text if isinstance(part, str) else bytes.__contains__(self, part)

    def __add__(self, other: Any) -> Any:
        return self.text + other if isinstance(other, str) else bytes.__add__(self, other)

    def __radd__(self, other: Any) -> Any:
        return other + self.text if isinstance(other, str) else NotImplemented

    def __getattr__(self, name: str) -> Any:
        """Methods that bytes lack: encode, format, casefold, isnumeric ..."""
        if name.startswith("_") or not hasattr(str, name):
            raise AttributeError(f"'OutputText' object has no attribute {name!r}")
        return getattr(self.text, name)


def _either(name: str) -> Callable[..., Any]:
    def method(self: OutputText, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        as_text = any(
            isinstance(a, str) or (isinstance(a, tuple) and any(isinstance(x, str) for x in a)) for a in given
        )
        return getattr(self.text, name)(*args, **kwargs) if as_text else getattr(bytes, name)(self, *args, **kwargs)

    method.__name__ = name
    method.__doc__ = f"`str.{name}` if an argument is a str, else `bytes.{name}`."
    return method


for _name in (
    *("startswith", "endswith", "find", "rfind", "index", "rindex", "count", "replace", "split", "rsplit"),
    *("partition", "rpartition", "strip", "lstrip", "rstrip", "removeprefix", "removesuffix"),
):
    setattr(OutputText, _name, _either(_name))
