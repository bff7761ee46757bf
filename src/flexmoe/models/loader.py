"""Weights into tensors that exist already. Enters: a ModelSource and the decoder's parameters. Leaves: them, filled.

It streams: files are opened one at a time (memory-mapped), and of each only the rows and columns that this rank needs
are copied, at most `_CHUNK_BYTES` at once. So host memory peaks at the parameters' own size plus one file.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flexmoe.config.packing import Packing
from flexmoe.config.plan import ParallelPlan
from flexmoe.config.shard import Shard
from flexmoe.errors import CheckpointError
from flexmoe.kernels.quantize import QuantizedMatrix, Weights
from flexmoe.models import families
from flexmoe.models.checkpoint import Match, open_checkpoint, validate
from flexmoe.models.families.layout import Piece
from flexmoe.models.hub import ModelSource
from flexmoe.models.slices import Cut, cuts

# Large enough to copy at full speed, small enough that converting on the way to a GPU costs no memory to speak of.
_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading took. bytes_read: of tensor data, replicas counted once."""

    seconds: float
    bytes_read: int
    num_tensors: int
    num_files: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Rows to write: `rows` from `start` of a parameter, or of one slot of it, all columns.

    first, columns: where they are in the stored tensor (columns None: all). source: expert of a fused tensor.
    """

    param: str
    start: int
    rows: int
    slot: int | None = None
    source: int | None = None
    first: int = 0
    columns: range | None = None

    def target(self, params: Mapping[str, Weights]) -> Weights:
        """The rows, as a view."""
        whole = params[self.param]
        return (whole if self.slot is None else whole[self.slot])[self.start : self.start + self.rows]


Work = tuple[Match, list[Copy]]


def load_weights(
    source: ModelSource, params: Mapping[str, Weights], shard: Shard | None = None, progress: bool = False
) -> LoadReport:
    """Fill `params` (the decoder's, by name) from the checkpoint, converting to each one's dtype, bits and device.

    What is stored quantized is taken as it is, into parameters of the same bits.
    shard: what this rank holds; None: all of it. A parameter of the model that is not in `params` is not read.
    Errors: CheckpointError, for a file that cannot be read; `open_model` has checked the rest.
    """
    if source.folder is None:
        raise CheckpointError(f"{source.name!r} is a preset without weights; use load_format='dummy'.")
    start = time.perf_counter()
    matches = source.matches or validate(open_checkpoint(source.folder), source.config, source.packing)
    held = cuts(shard or Shard(ParallelPlan(), source.config))
    work = _plan([match for match in matches if match.piece.param in params], held)
    files = sorted({match.tensor.file for match, _ in work})
    _check_complete(work, params)
    with bar(sum(_bytes_to_read(*item) for item in work), progress) as advance, torch.no_grad():
        for file in files:
            _read_file(file, [w for w in work if w[0].tensor.file == file], params, source.packing, advance)
    total = sum(_bytes_to_read(*item) for item in work)
    return LoadReport(time.perf_counter() - start, total, len(work), len(files))


def fill_dummy(
    params: Mapping[str, Weights],
    seed: int = 0,
    stored: torch.dtype | None = None,
    shard: Shard | None = None,
) -> None:
    """Random weights, in place. Each parameter's values depend on its name, shape, dtype, device and the seed only.

    Matrices are normal with variance 1 / columns, so that activations keep their size; embeddings are unit normal,
    norms 1 and biases 0. stored: what a checkpoint would hold them in. A parameter in a wider dtype, such as a router,
    gets values that are exact in that one, so that whoever keeps it narrow computes with the same numbers.

    shard: what this rank holds. Each parameter is then made whole, one at a time, and cut: all ranks together hold the
    numbers that one would.
    """
    if shard is not None and shard.plan.num_ranks > 1:
        whole, held = families.parameters(shard.config), cuts(shard)
        for name, param in params.items():
            if isinstance(param, torch.Tensor) and param.numel():  # several ranks hold no quantized weights
                full = torch.empty(whole[name].shape, dtype=param.dtype, device=param.device)
                _fill_one(name, full, seed, stored or full.dtype)
                param.copy_(_cut_out(full, held[name]))
        return
    # Each parameter has its own generator, so threads change the time only: a generator runs on one core.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda item: _fill_one(item[0], item[1], seed, stored), params.items()))


def _cut_out(whole: torch.Tensor, cut: Cut) -> torch.Tensor:
    part = whole if cut.slots is None else whole[list(cut.slots)]
    dim = 0 if cut.slots is None else 1
    part = torch.cat([part.narrow(dim, rows.start, len(rows)) for rows in cut.rows], dim)
    return part if cut.columns is None else part[..., cut.columns.start : cut.columns.stop]


@torch.no_grad()
def _fill_one(name: str, param: Weights, seed: int, stored: torch.dtype | None) -> None:
    if isinstance(param, QuantizedMatrix):
        whole = torch.empty(param.shape, dtype=stored or torch.float32)
        _fill_one(name, whole, seed, whole.dtype)
        param.copy_(whole)
        return
    stored = stored or param.dtype
    if name.endswith("norm.weight"):
        param.fill_(1.0)
    elif name.endswith(".bias"):
        param.zero_()
    else:
        std = 1.0 if name == "embed_tokens.weight" else param.shape[-1] ** -0.5
        generator = torch.Generator(param.device).manual_seed(_seed(name, seed))
        param.normal_(0.0, std, generator=generator)
        if stored.itemsize < param.dtype.itemsize:
            row_bytes = param[0].numel() * param.itemsize
            for rows in param.split(max(1, _CHUNK_BYTES // row_bytes)):  # never a second copy of all
                rows.copy_(rows.to(stored))


def _seed(name: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes signed 64 bits


def _plan(matches: list[Match], held: Mapping[str, Cut]) -> list[Work]:
    """What to copy from which tensor, in the order of bytes on disk; tensors that this rank does not need drop out."""
    ordered = sorted(matches, key=lambda match: match.tensor.offset)
    return [(match, copies) for match in ordered if (copies := _copies(match.piece, held[match.piece.param]))]


def _copies(piece: Piece, cut: Cut) -> list[Copy]:
    """Where a stored tensor goes: rows of a parameter, or of every slot that holds its expert (replicas too)."""
    found = []
    start = 0
    for held in cut.rows:
        first, stop = max(held.start, piece.start), min(held.stop, piece.start + piece.shape[1 if piece.fused else 0])
        if first < stop:
            place = (start + first - held.start, stop - first)
            for slot, source in _slots(piece, cut):
                found.append(Copy(piece.param, *place, slot, source, first - piece.start, cut.columns))
        start += len(held)
    return found


def _slots(piece: Piece, cut: Cut) -> list[tuple[int | None, int | None]]:
    """The slots that a stored tensor fills, each with the expert to take from it if it holds them all."""
    if piece.fused:
        return list(enumerate(cut.slots or ()))
    if piece.expert is None:
        return [(None, None)]
    return [(slot, None) for slot, expert in enumerate(cut.slots or ()) if expert == piece.expert]


def _check_complete(work: list[Work], params: Mapping[str, Weights]) -> None:
    """Every element of every parameter is written exactly once: our own invariant, the checkpoint is valid by now."""
    copies = [copy for _, copies in work for copy in copies]
    filled = dict.fromkeys(params, 0)
    for copy in copies:
        filled[copy.param] += copy.rows * math.prod(params[copy.param].shape[1 if copy.slot is None else 2 :])
    wrong = [name for name, param in params.items() if filled[name] != param.numel()]
    assert not wrong, f"the checkpoint would not fill exactly: {wrong[:5]}"
    assert len({(c.param, c.slot, c.start) for c in copies}) == len(copies), "two tensors would fill the same rows"


def _bytes_to_read(match: Match, copies: list[Copy]) -> int:
    """Of the tensor what is asked for, rows for several slots counted once."""
    total = 0
    for rows, columns in {(c.source, c.first): (c.rows, c.columns) for c in copies}.values():
        whole = rows * match.row_bytes
        total += whole if columns is None else whole * len(columns) // match.piece.shape[-1]
    return total


def _read_file(
    file: Path,
    work: list[Work],
    params: Mapping[str, Weights],
    packing: Packing | None,
    advance: Callable[[int, str], None],
) -> None:
    """Copy what one file holds. Its memory map goes when this returns, before the next file is opened."""
    try:
        with safe_open(file, framework="pt") as stored:
            for match, copies in work:
                rows = stored.get_slice(match.tensor.name)
                scales = None if match.scales is None else stored.get_slice(match.scales.name)
                step = max(1, _CHUNK_BYTES // match.row_bytes)
                for copy in copies:
                    if scales is None or packing is None:
                        _copy_rows(rows, copy, copy.target(params), step)
                    else:
                        _copy_packed(rows, scales, copy, copy.target(params), packing)
                advance(_bytes_to_read(match, copies), file.name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _copy_rows(rows: Any, copy: Copy, target: Weights, step: int) -> None:
    """`step` rows at a time: slices of a memory map are views, so only the converted rows are ever a copy."""
    columns = () if copy.columns is None else (slice(copy.columns.start, copy.columns.stop),)
    for begin in range(0, copy.rows, step):
        end = min(begin + step, copy.rows)
        place = (slice(copy.first + begin, copy.first + end), *columns)
        target[begin:end].copy_(rows[place] if copy.source is None else rows[(copy.source, *place)])


def _copy_packed(codes: Any, scales: Any, copy: Copy, target: Weights, packing: Packing) -> None:
    """Codes and scales as they are stored: nothing is converted, so nothing needs to be cut into pieces."""
    assert isinstance(target, QuantizedMatrix), f"{copy.param} is stored quantized, and to be held full"
    assert copy.columns is None or len(copy.columns) == target.columns, "one rank holds all columns"
    rows = slice(copy.first, copy.first + copy.rows)
    place = rows if copy.source is None else (copy.source, rows)
    target.assign(codes[place], scales[place], packing.group_size)


@contextmanager
def bar(total: int, shown: bool, word: str = "Loading") -> Iterator[Callable[[int, str], None]]:
    """Yields advance(bytes, file name). The bar goes to stderr: stdout belongs to the program's answer."""
    if not shown:
        yield lambda _bytes, _file: None
        return
    # Imported here: most loads, in tests and servers, show no bar.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(word + " {task.fields[file]}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, file="weights")
        yield lambda count, file: bar.update(task, advance=count, file=file)
