"""What is asked of a server, and when. Enters: LoadOptions. Leaves: requests with their prompts, in order.

Prompts are random token ids, or as many random words where a server takes text. A block of a trace is drawn with its id
as seed, so that prompts share what they shared there.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flexmoe.errors import ConfigError
from flexmoe.planner.arrivals import poisson
from flexmoe.planner.trace import BLOCK_TOKENS, TraceRequest, read_trace

Prompt = str | list[int] | list[dict[str, Any]]  # text, token ids, or the messages of a chat
Range = tuple[int, int]  # both ends included

DEFAULT_REQUESTS = 100

# Short and frequent, so that most tokenizers spend about one token on each.
_WORDS = (
    "the of and to in is was he for it with as his on be at by had not are but from or have an they which one you were "
    "her all she there would their we him been has when who will more no if out so said what up its about into than "
    "them can only other new some could time these two may then do first any my now such like our over man me even "
    "most made after also did many before must through back years where much your way well down should because each "
    "just those people how too little state good very make world still own see men work long get here between both "
    "life being under never day same another know while last might us great old year off come since against go came "
    "right used take three"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What is asked.

    rate: requests a second, at random times. trace: a file that says when, and how long. Neither: each request is due
    when another has ended. time_scale, length_scale: factors for a trace's gaps and lengths. duration: nothing is due
    after so many seconds. num_requests: None for all of a trace, for what fits into the duration, or else 100.
    input_len, output_len: tokens, drawn evenly from a range. text: words in place of token ids. prompts: a file of
    JSON lines to be asked in turn. warm_up: requests that are asked before and not counted.
    """

    rate: float | None = None
    trace: Path | None = None
    time_scale: float = 1.0
    length_scale: float = 1.0
    duration: float | None = None
    num_requests: int | None = None
    input_len: Range = (128, 128)
    output_len: Range = (64, 64)
    text: bool = False
    prompts: Path | None = None
    warm_up: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rate is not None and self.trace is not None:
            raise ConfigError("a rate and a trace both say when requests are due; give one of them.")
        if self.duration is not None and self.is_closed:
            raise ConfigError("a duration needs times at which requests are due; add a rate or a trace.")
        if self.trace is None and (self.time_scale, self.length_scale) != (1, 1):
            raise ConfigError("time_scale and length_scale are factors for a trace; give one, or leave them out.")
        if self.prompts is not None and self.trace is not None:
            raise ConfigError(
                "a trace says how long prompts are, and a file of prompts what they are; give one of them."
            )

    @property
    def is_closed(self) -> bool:
        """A request is due when another has ended."""
        return self.rate is None and self.trace is None


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to come. due: seconds after the start; None: as soon as another has ended. output_len: in tokens."""

    number: int
    due: float | None
    prompt: Prompt
    output_len: int


def plan(options: LoadOptions, vocab_size: int) -> Iterator[Planned]:
    """All requests of a run, one after the other, for together their prompts may be large.

    vocab_size: token ids are drawn below it. Raises ConfigError for a file that is not understood.
    """
    return _of_trace(options, vocab_size) if options.trace is not None else _drawn(options, vocab_size)


def lengths(options: LoadOptions, concurrency: int | None = None) -> list[TraceRequest]:
    """The same requests without their prompts, as a simulation serves them. Raises ConfigError for a load without any.

    That is a closed loop of more than `concurrency` requests, which are due when others end (fewer are due at once),
    and a load of texts, whose tokens a server counts.
    """
    waits = options.is_closed and (options.num_requests or DEFAULT_REQUESTS) > (concurrency or 0)
    if waits or options.text or options.prompts is not None:
        raise ConfigError("only token ids that are due at a rate or by a trace can be simulated; measure such a load.")
    if options.trace is None:
        return [TraceRequest(each.due or 0.0, len(each.prompt), each.output_len) for each in _drawn(options, 1)]
    return [
        TraceRequest(
            moment, _scaled(request.input_len, options), _scaled(request.output_len, options),
            request.blocks if options.length_scale == 1 else (),
        )
        for request, moment in _within_duration(options)
    ]  # fmt: skip


def warm_up(options: LoadOptions, vocab_size: int) -> Iterator[Planned]:
    """Requests to be asked before: as long as the options say, with prompts that no request of the run has."""
    drawn = itertools.islice(_random(options, vocab_size, "warm-up"), options.warm_up)
    return (Planned(number, None, *request) for number, request in enumerate(drawn))


# ------------------------------------------------------------------ of a trace


def _of_trace(options: LoadOptions, vocab_size: int) -> Iterator[Planned]:
    blocks = _Blocks(options, vocab_size)
    for number, (request, moment) in enumerate(_within_duration(options)):
        yield Planned(number, moment, blocks.prompt(number, request), _scaled(request.output_len, options))


def _within_duration(options: LoadOptions) -> Iterator[tuple[TraceRequest, float]]:
    """The trace's requests that count, and when each is due."""
    assert options.trace is not None
    due = ((request, request.arrival * options.time_scale) for request in read_trace(options.trace))
    return itertools.islice(
        (pair for pair in due if options.duration is None or pair[1] <= options.duration), options.num_requests
    )


class _Blocks:
    """Prompts of a trace. A block is drawn once and kept, as a trace asks for the same ones again and again.

    In arrays: a day's trace has tens of millions of tokens.
    """

    def __init__(self, options: LoadOptions, vocab_size: int) -> None:
        self._options, self._vocab_size = options, vocab_size
        self._length = _scaled(BLOCK_TOKENS, options)
        self._drawn: dict[int, array[int]] = {}

    def prompt(self, number: int, request: TraceRequest) -> Prompt:
        """Its blocks one after the other, as far as its length goes; what they leave open is its own."""
        length = _scaled(request.input_len, self._options)
        units = list(itertools.chain.from_iterable(map(self._block, request.blocks)))[:length]
        draw = random.Random(f"prompt {self._options.seed} {number}")
        units += _units(draw, self._vocab_size, self._options, length - len(units))
        return _as_prompt(units, self._options)

    def _block(self, block: int) -> array[int]:
        if block not in self._drawn:
            draw = random.Random(f"block {self._options.seed} {block}")
            self._drawn[block] = array("I", _units(draw, self._vocab_size, self._options, self._length))
        return self._drawn[block]


def _scaled(length: int, options: LoadOptions) -> int:
    return max(1, round(length * options.length_scale))


# ------------------------------------------------------------------ drawn, or of a file


def _drawn(options: LoadOptions, vocab_size: int) -> Iterator[Planned]:
    asked = _of_file(options) if options.prompts is not None else _random(options, vocab_size, "prompt")
    for number, (due, request) in enumerate(zip(_due(options), asked, strict=False)):
        yield Planned(number, due, *request)


def _due(options: LoadOptions) -> list[float | None]:
    count = options.num_requests
    if options.rate is None:
        return [None] * (count or DEFAULT_REQUESTS)
    if options.duration is None:
        return list(poisson(options.rate, count or DEFAULT_REQUESTS, options.seed))
    # More than can be expected by so much that it practically never falls short.
    expected = options.rate * options.duration
    most = math.ceil(expected + 10 * math.sqrt(expected) + 10)
    due = [moment for moment in poisson(options.rate, most, options.seed) if moment <= options.duration]
    return list(due[:count])


def _random(options: LoadOptions, vocab_size: int, purpose: str) -> Iterator[tuple[Prompt, int]]:
    for number in itertools.count():
        draw = random.Random(f"{purpose} {options.seed} {number}")
        length, output_len = _within(draw, options.input_len), _within(draw, options.output_len)
        yield _as_prompt(_units(draw, vocab_size, options, length), options), output_len


def _of_file(options: LoadOptions) -> Iterator[tuple[Prompt, int]]:
    """The file's prompts in turn, from the start again when they are used up."""
    assert options.prompts is not None
    draw = random.Random(f"lengths {options.seed}")
    for prompt, output_len in itertools.cycle(read_prompts(options.prompts)):
        yield prompt, output_len or _within(draw, options.output_len)


def read_prompts(path: Path) -> list[tuple[Prompt, int | None]]:
    """Of each line the prompt and, if it says so, how many tokens to ask for.

    A line is a string, a list of token ids, or an object with `prompt` (one of these) or `messages`, and `max_tokens`.
    Raises ConfigError with the line and the reason.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompts {path} cannot be read: {error}.") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found += [_asked(json.loads(line))] if line.strip() else []
        except ValueError as error:
            raise ConfigError(f"the prompts {path} are refused, line {number}: {error}.") from error
    if not found:
        raise ConfigError(f"the prompts {path} are empty.")
    return found


def _asked(value: Any) -> tuple[Prompt, int | None]:
    request = value if isinstance(value, dict) else {"prompt": value}
    count = request.get("max_tokens")
    if count is not None and (type(count) is not int or count < 1):
        raise ValueError(f"max_tokens={count!r} is not a positive integer")
    text, messages = request.get("prompt"), request.get("messages")
    if isinstance(text, str):
        return text, count
    if _is_list(text, int):
        return cast("list[int]", text), count
    if _is_list(messages, dict):
        return cast("list[dict[str, Any]]", messages), count
    raise ValueError("no text, list of token ids, or object with `prompt` or `messages`")


def _is_list(value: object, item: type) -> bool:
    return isinstance(value, list) and bool(value) and all(type(part) is item for part in value)


def _within(draw: random.Random, bounds: Range) -> int:
    return draw.randint(*bounds)


def _units(draw: random.Random, vocab_size: int, options: LoadOptions, count: int) -> list[int]:
    """Token ids, or numbers of words."""
    return draw.choices(range(len(_WORDS) if options.text else vocab_size), k=max(0, count))


def _as_prompt(units: Sequence[int], options: LoadOptions) -> Prompt:
    return " ".join(_WORDS[unit] for unit in units) if options.text else list(units)
