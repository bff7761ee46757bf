"""Output ids to text as it comes. Enters: new token ids of one request. Leaves: new text, cut at a stop string.

Text that could still turn into a stop string is held back, and released as soon as it cannot. Which stop string ends
the text, and where, does not depend on how tokens were grouped: it is the one completed first, and of those completed
by the same character the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexmoe.config.sampling import SamplingParams
from flexmoe.engine.token_text import text_stream
from flexmoe.engine.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sample of one request. Work a token is constant, whatever came before."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> None:
        """The prompt is context: a space at the start of the output stays, a character begun there is finished."""
        self.stopped_by: str | None = None
        self._stream = text_stream(tokenizer, sampling.skip_special_tokens)
        self._stream.prime(prompt_token_ids)
        self._stops = [_StopString(stop) for stop in sampling.stop]
        self._include_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._num_tokens = 0
        self._held = ""
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All text released so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def append(self, token_ids: Sequence[int]) -> str:
        """New text of new tokens; leave out the token that ended the request. After a stop string: nothing."""
        return self._release("".join(self._take(token_id) for token_id in token_ids))

    def flush(self) -> str:
        """The text still held back, when no token follows. It may complete a stop string."""
        if self.stopped_by is not None:
            return ""
        rest = self._search(self._stream.finish())
        if self.stopped_by is None:
            rest, self._held = rest + self._held, ""
        return self._release(rest)

    def _take(self, token_id: int) -> str:
        if self.stopped_by is not None:
            return ""
        self._num_tokens += 1
        return self._search(self._stream.feed(token_id))

    def _release(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text

    def _search(self, new: str) -> str:
        """Text that is no part of a stop string; up to the end, or with a stop string found up to that."""
        if not self._stops or not new:
            return new
        text, start = self._held + new, len(self._held)
        for end, char in enumerate(new, start + 1):
            # All of them read every character, lest one miss what another found.
            found = [stop for stop in self._stops if stop.advance(char)]
            if found and self._num_tokens >= self._min_tokens:
                return self._stop(text[:end], max(found, key=lambda stop: len(stop.text)).text)
        keep = len(text) - max(stop.matched for stop in self._stops)
        self._held = text[keep:]
        return text[:keep]

    def _stop(self, text: str, stop: str) -> str:
        self.stopped_by = stop
        self._held = ""
        return text if self._include_stop else text[: len(text) - len(stop)]


class _StopString:
    """How much of a stop string the text ends with, kept up one character at a time (Knuth, Morris, Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._fallback = [0] * (len(text) + 1)  # [m]: the next shorter prefix that text[:m] ends with
        for end in range(1, len(text)):
            self._fallback[end + 1] = self._step(self._fallback[end], text[end])

    def advance(self, char: str) -> bool:
        """Whether this character completes the stop string. After that, the search goes on for the next one."""
        self.matched = self._step(self.matched, char)
        if self.matched < len(self.text):
            return False
        self.matched = self._fallback[self.matched]
        return True

    def _step(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self._fallback[matched]
        return matched + (self.text[matched] == char)
