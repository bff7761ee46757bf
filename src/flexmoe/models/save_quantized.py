"""A checkpoint written anew in few bits. Enters: a ModelSource of full weights. Leaves: a folder like it, smaller.

It streams: of each tensor some rows at a time are read, rounded and written to their place in the new file, which is
known beforehand from the shapes. docs/quantization.md says what the files hold.
"""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from flexmoe.config.packing import GROUP, KEY, SCALE, Packing, code_columns
from flexmoe.errors import CheckpointError, ConfigError
from flexmoe.kernels.quantize import QuantizedMatrix
from flexmoe.models.checkpoint import CODES, INDEX, SINGLE, SIZES, Match
from flexmoe.models.families.layout import Shape
from flexmoe.models.hub import SMALL_FILES, ModelSource
from flexmoe.models.loader import bar
from flexmoe.models.quantized import bits_of

_CHUNK_BYTES = 32 * 2**20  # of rows that are read at once
_SHARD_BYTES = 4 * 2**30
_ALIGNMENT = 8  # of the first tensor's bytes, by the safetensors format


@dataclass(frozen=True, slots=True)
class SaveReport:
    """Bytes of tensors read and written, and into how many files."""

    bytes_read: int
    bytes_written: int
    num_files: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor to write."""

    name: str
    dtype: str
    shape: Shape

    @property
    def num_bytes(self) -> int:
        return SIZES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Item:
    """A stored tensor and what becomes of it: itself, or codes and scales."""

    match: Match
    bits: int | None
    entries: tuple[_Entry, ...]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)


def save_quantized(source: ModelSource, packing: Packing, out: Path, progress: bool = False) -> SaveReport:
    """Write the model into a new folder `out`, with its configuration and tokenizer.

    Raises CheckpointError if `out` exists or the model has no weights, ConfigError if they are quantized already or
    the group does not divide a row. After an error nothing is left behind.
    """
    folder = _check(source, out)
    shards = list(_shards([_item(match, packing) for match in _in_order(source)]))
    total = sum(item.match.tensor.num_bytes for shard in shards for item in shard)
    try:
        with _folder_for(out) as made, bar(total, progress, "Rounding") as advance:
            _write_shards(made, shards, packing, advance)
            _write_config(made / "config.json", source, packing)
            _copy_small_files(folder, made)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}.") from error
    return SaveReport(total, sum(item.num_bytes for shard in shards for item in shard), len(shards))


@contextmanager
def _folder_for(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` if all goes well, and vanishes otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield made
        made.chmod(0o755)  # mkdtemp's is for its owner alone
        made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _check(source: ModelSource, out: Path) -> Path:
    """The folder to read from."""
    if source.packing is not None:
        raise ConfigError(
            f"{source.name} is quantized already, to {source.packing.quantization}; rounding twice loses more: give "
            "the full model."
        )
    if source.folder is None or not source.matches:
        raise CheckpointError(f"{source.name!r} has no weights to round; give a model's folder or hub id.")
    if out.exists():
        raise CheckpointError(f"{out} exists already; name a new folder, or remove it first.")
    return source.folder


def _in_order(source: ModelSource) -> list[Match]:
    """As the tensors lie on disk."""
    return sorted(source.matches, key=lambda match: (match.tensor.file, match.tensor.offset))


def _item(match: Match, packing: Packing) -> _Item:
    tensor, bits = match.tensor, bits_of(match.piece.param, packing.quantization)
    if bits is None:
        return _Item(match, None, (_Entry(tensor.name, tensor.dtype, tensor.shape),))
    *rows, columns = tensor.shape
    size = packing.group_size
    if size > GROUP and columns % size:
        fitting = [f"{n}, or " for n in range(size, GROUP, -GROUP) if columns % n == 0] or [""]
        raise ConfigError(
            f"group_size={size} does not divide the {columns} columns of {tensor.name}; use {fitting[0]}{GROUP}, "
            "whose last group may be shorter."
        )
    codes = _Entry(tensor.name, CODES[bits], (*rows, code_columns(columns, bits)))
    scales = _Entry(tensor.name + SCALE, "BF16", (*rows, packing.scale_columns(columns)))
    return _Item(match, bits, (codes, scales))


def _shards(items: list[_Item]) -> Iterator[list[_Item]]:
    """As many items in a file as fit into its size, but at least one."""
    shard: list[_Item] = []
    size = 0
    for item in items:
        if shard and size + item.num_bytes > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(item)
        size += item.num_bytes
    yield shard


def _shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_shards(
    folder: Path, shards: list[list[_Item]], packing: Packing, advance: Callable[[int, str], None]
) -> None:
    names = [_shard_name(number, len(shards)) for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, packing, advance)
    if len(shards) > 1:
        _write_index(folder / INDEX, names, shards)


def _write_shard(path: Path, items: list[_Item], packing: Packing, advance: Callable[[int, str], None]) -> None:
    """Wide numbers first, so that each tensor's address is a multiple of its numbers' size."""
    entries = sorted((e for item in items for e in item.entries), key=lambda entry: -SIZES[entry.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for entry in entries:
        places[entry.name] = end
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [end, end + entry.num_bytes],
        }
        end += entry.num_bytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        start = file.tell()
        file.truncate(start + end)
        for item in items:
            _write_item(file, item, {e.name: start + places[e.name] for e in item.entries}, packing.group_size)
            advance(item.match.tensor.num_bytes, path.name)


def _write_item(file: BinaryIO, item: _Item, places: dict[str, int], group: int) -> None:
    """Codes go out as they are made; scales, a seventeenth of them, wait until the codes are complete."""
    name, scales = item.match.tensor.name, []
    file.seek(places[name])
    for rows in _pieces(item.match):
        if item.bits is None:
            file.write(_raw(rows))
            continue
        made = QuantizedMatrix.empty(rows.shape, item.bits).copy_(rows, group)
        file.write(_raw(made.codes))
        scales.append(_raw(made.scales[..., :: group // GROUP]))
    if item.bits is not None:
        file.seek(places[name + SCALE])
        file.writelines(scales)


def _pieces(match: Match) -> Iterator[torch.Tensor]:
    """The stored tensor, some rows at a time, in the order of its bytes."""
    tensor, step = match.tensor, max(1, _CHUNK_BYTES // match.row_bytes)
    try:
        with safe_open(tensor.file, framework="pt") as stored:
            whole = stored.get_slice(tensor.name)
            count = tensor.shape[1 if match.piece.fused else 0]
            for expert in range(tensor.shape[0]) if match.piece.fused else (None,):
                for begin in range(0, count, step):
                    rows = slice(begin, min(begin + step, count))
                    yield whole[rows] if expert is None else whole[expert, rows]
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{tensor.file} cannot be read: {error}") from error


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _write_index(path: Path, names: list[str], shards: list[list[_Item]]) -> None:
    places = {e.name: name for name, shard in zip(names, shards, strict=True) for item in shard for e in item.entries}
    size = sum(item.num_bytes for shard in shards for item in shard)
    path.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2), encoding="utf-8")


def _write_config(path: Path, source: ModelSource, packing: Packing) -> None:
    """The model's own, with the layout. dtype: of what is not rounded, which the files' bytes no longer show."""
    config = dict(source.hf_config) | {KEY: packing.to_json()}
    if not config.get("torch_dtype"):
        config["dtype"] = source.config.checkpoint_dtype
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _copy_small_files(folder: Path, made: Path) -> None:
    """Tokenizer, chat template and the like; not the index of the files that were left behind."""
    for file in folder.iterdir():
        wanted = any(fnmatch.fnmatch(file.name, pattern) for pattern in SMALL_FILES)
        if wanted and file.is_file() and file.name not in ("config.json", INDEX):
            shutil.copyfile(file, made / file.name)
