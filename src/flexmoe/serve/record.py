"""FlexFlow's output file. Enters: finished requests. Leaves: three parts each, appended to a text file.

    [Profile] guid(1000000) llm_decoding_steps(12) latency(345.678) ttft(34.567)      times in microseconds
    token IDs: 1,5,9                                                                  prompt and output
    the text of these tokens, as many lines as it has

A newline stands before each further record, none at the end of the file, so that the text of a single prompt can be
compared byte by byte with that of another program.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flexmoe.serve.errors import MissingFileError

if TYPE_CHECKING:
    from flexmoe import RequestOutput

_guids = itertools.count(1_000_000)
_lock = threading.Lock()


def render(output: RequestOutput, token_ids: Sequence[int], text: str) -> str:
    """One record. A decoding step is counted for each token the model was asked for, the end-of-sequence included.

    Both times count from the arrival of the request.
    """
    metrics = output.metrics
    latency = 0.0 if metrics.finished is None else metrics.finished - metrics.arrival
    return (
        f"[Profile] guid({next(_guids)}) llm_decoding_steps({len(output.token_ids)}) "
        f"latency({latency * 1e6:.3f}) ttft({(metrics.ttft or 0.0) * 1e6:.3f})\n"
        f"token IDs: {','.join(map(str, token_ids))}\n"
        f"{text}"
    )


def prepare(path: str | Path) -> None:
    """Make the file and its folder if need be; asked before work is done. Raises MissingFileError."""
    file = Path(path).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a", encoding="utf-8").close()
    except OSError as error:
        raise MissingFileError(f"output_file={str(path)!r} cannot be written: {error.strerror}.") from error


def append(path: str | Path, records: Sequence[str]) -> None:
    """Add records to a prepared file."""
    file = Path(path).expanduser()
    with _lock, file.open("a", encoding="utf-8", newline="") as stream:
        stream.write(("\n" if stream.tell() else "") + "\n".join(records))
