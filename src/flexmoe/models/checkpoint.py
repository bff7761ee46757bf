"""A folder of safetensors, checked before a byte of weights is read. Enters: a folder. Leaves: where each tensor lies.

`open_checkpoint` reads each file's header once: 8 bytes that give the header's length, then JSON of names, dtypes,
shapes and offsets (github.com/huggingface/safetensors, "Format"). `validate` holds them against the ModelConfig.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmoe.config.model import ModelConfig
from flexmoe.config.packing import SCALE, Packing, code_columns
from flexmoe.errors import CheckpointError, MissingTensorError, TensorShapeError
from flexmoe.models import families
from flexmoe.models.families.layout import Piece, Shape
from flexmoe.models.quantized import bits_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Bytes of one element, for the number formats that are served.
ITEM_SIZES: Mapping[str, int] = {"F32": 4, "BF16": 2, "F16": 2}
# Codes of quantized weights, by their bits.
CODES: Mapping[int, str] = {8: "I8", 4: "U8"}
SIZES: Mapping[str, int] = {**ITEM_SIZES, **dict.fromkeys(CODES.values(), 1)}
_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Tables of sines and masks that old versions of transformers saved along; both are computed here.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.masked_bias$")
# safetensors itself refuses longer headers.
_MAX_HEADER = 100_000_000
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in one file. dtype as in the header ("BF16"); offset: of its first byte in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a folder, by name."""

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, StoredTensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> str | None:
        """The number format that most bytes are in ("bfloat16"); None if there is no tensor."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            name = _DTYPE_NAMES.get(tensor.dtype, tensor.dtype)
            sizes[name] = sizes.get(name, 0) + tensor.num_bytes
        return max(sizes, key=sizes.__getitem__, default=None)


@dataclass(frozen=True, slots=True)
class Match:
    """A stored tensor and the piece of our parameters that it fills. bits, scales: of one that is stored quantized."""

    tensor: StoredTensor
    piece: Piece
    bits: int | None = None
    scales: StoredTensor | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in the file, with its scales."""
        parts = [self.tensor] if self.scales is None else [self.tensor, self.scales]
        first = 2 if self.piece.fused else 1
        return sum(SIZES[part.dtype] * math.prod(part.shape[first:]) for part in parts)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of all files. Errors: CheckpointError for a missing, truncated, damaged or pickled file."""
    files, listed = _find_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_header(file):
            if tensor.name in tensors:
                raise CheckpointError(f"{tensor.name} is in both {tensors[tensor.name].file.name} and {file.name}.")
            tensors[tensor.name] = tensor
    lost = [name for name in listed if name not in tensors]
    if lost:
        raise MissingTensorError(f"{folder / INDEX} lists {_some(lost)}, but no file holds {_them(lost)}.")
    return Checkpoint(folder, files, tensors)


def validate(checkpoint: Checkpoint, config: ModelConfig, packing: Packing | None = None) -> tuple[Match, ...]:
    """Match every tensor with its place; refuse a checkpoint that does not fill the model exactly once.

    Errors: MissingTensorError, TensorShapeError, and CheckpointError for tensors that the model has no place for, a
    number format that is not served, or a place that two tensors would fill. Each names up to five tensors.
    """
    places = families.tensors(config)
    known = _matches(checkpoint, places, packing)
    _refuse_unexpected(checkpoint, config, known)
    _refuse_missing(checkpoint, places, known)
    _refuse_shapes(known, packing)
    _refuse_dtypes(known)
    _refuse_twice(known, places)
    return tuple(known)


def _matches(checkpoint: Checkpoint, places: Mapping[str, Piece], packing: Packing | None) -> list[Match]:
    found = []
    for name, tensor in checkpoint.tensors.items():
        if name in places:
            piece = places[name]
            bits = None if packing is None else bits_of(piece.param, packing.quantization)
            scales = None if bits is None else _scales(checkpoint, tensor)
            found.append(Match(tensor, piece, bits, scales))
    return found


def _scales(checkpoint: Checkpoint, codes: StoredTensor) -> StoredTensor:
    scales = checkpoint.tensors.get(codes.name + SCALE)
    if scales is None or scales.file != codes.file:
        raise MissingTensorError(f"{codes.file} lacks {codes.name}{SCALE}, the scales of its quantized weights.")
    return scales


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = _header_length(file, stream.read(8), size)
            header = _parse_header(file, stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    tensors = [_stored(file, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
    end = 8 + length
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(f"{file} is damaged: {tensor.name} does not begin where the tensor before it ends.")
        end += tensor.num_bytes
    if size < end:
        raise _truncated(file, end, size)
    if size > end:
        raise CheckpointError(f"{file} is damaged: {end:,} bytes by its header, {size:,} in fact; download it again.")
    return tensors


def _header_length(file: Path, start: bytes, size: int) -> int:
    length: int = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if start == b"version ":
        raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder.")
    if length > _MAX_HEADER:
        raise CheckpointError(f"{file} is not a safetensors file: its header would be {length:,} bytes long.")
    if length == 0 or size < 8 + length:
        raise _truncated(file, 8 + max(length, 2), size)
    return length


def _truncated(file: Path, expected: int, size: int) -> CheckpointError:
    return CheckpointError(
        f"{file} is truncated: {expected:,} bytes expected by its header, {size:,} found; download it again."
    )


def _parse_header(file: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a safetensors file, or damaged: its header is not JSON.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is not a safetensors file, or damaged: its header is not an object.")
    return header


def _stored(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file} is damaged: its header's entry for {name} is malformed.") from error
    item = SIZES.get(dtype)
    if begin < 0 or end < begin or (item is not None and end - begin != item * math.prod(shape)):
        raise CheckpointError(
            f"{file} is damaged: {name} is {dtype} of shape {list(shape)} but has {end - begin:,} bytes."
        )
    return StoredTensor(name, dtype, shape, file, data_start + begin, end - begin)


def _find_files(folder: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The weight files, and the tensor names that the index promises."""
    if (folder / SINGLE).is_file():  # as in transformers, it goes before an index
        return (folder / SINGLE,), ()
    if (folder / INDEX).is_file():
        return _read_index(folder / INDEX)
    files = _unindexed(folder)
    if not files:
        raise CheckpointError(explain_no_safetensors(folder))
    _require_all([_shards_by_name(file) for file in files], folder)
    return tuple(files), ()


def _unindexed(folder: Path) -> list[Path]:
    """Every safetensors file but Mistral's own form of the same weights (consolidated*) and LoRA adapters."""
    return sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith(("consolidated", "adapter")))


def has_weights(folder: Path) -> bool:
    """Whether the folder holds safetensors to load, complete or not."""
    return (folder / INDEX).is_file() or bool(_unindexed(folder))


def _read_index(index: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: it is no JSON object with a weight_map.") from error
    names = sorted(set(places.values()))
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} is refused: it names files outside its own folder.")
    _require_all([names], index.parent)
    return tuple(index.parent / name for name in names), tuple(places)


def _shards_by_name(file: Path) -> list[str]:
    """model-00002-of-00004.safetensors promises four files; any other name only itself."""
    found = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\.safetensors)", file.name)
    if not found:
        return [file.name]
    return [f"{found[1]}{i:05d}{found[2]}" for i in range(1, int(found[3]) + 1)]


def _require_all(groups: Iterable[list[str]], folder: Path) -> None:
    promised = sorted({name for group in groups for name in group})
    missing = [name for name in promised if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(promised)} weight files: {_some(missing)}; download them again."
        )


def explain_no_safetensors(folder: Path) -> str:
    """Why this folder cannot be loaded, and what to do: by the other formats that lie in it."""
    names = sorted(file.name for file in folder.iterdir())
    pickles = [n for n in names if n.startswith("pytorch_model") and n.endswith(".bin")]
    originals = [n for n in names if n.startswith("consolidated.") or n.endswith((".pt", ".pth", ".ckpt"))]
    ggufs = [n for n in names if n.endswith(".gguf")]
    start = f"{folder} holds no safetensors weights"
    if pickles:
        return f"{start}, only pickle files ({_some(pickles)}), which can run code when read. {convert_hint(folder)}"
    if originals:
        return (
            f"{start} that are read here, only the publisher's own format ({_some(originals)}). Use the model's "
            f"Hugging Face version with safetensors; if transformers can read this folder: {convert_hint(folder)}"
        )
    if ggufs:
        return f"{start}, only GGUF ({_some(ggufs)}). Use the model that it was made from, in safetensors."
    if "adapter_config.json" in names:
        return f"{start} but a LoRA adapter; merge it into its base model first (peft: merge_and_unload) and save that."
    return f"{start} ({_some(names) if names else 'it is empty'}); it needs {SINGLE} or {INDEX} with its shards."


def convert_hint(source: str | Path) -> str:
    """The command that rewrites a pickle checkpoint as safetensors."""
    target = f"{Path(source).name}-safetensors"
    return (
        "Convert it once, if you trust its origin (needs `pip install transformers`): "
        f'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
        f"s, t = {str(source)!r}, {target!r}; "
        "M.from_pretrained(s, dtype='auto').save_pretrained(t); T.from_pretrained(s).save_pretrained(t)\""
    )


def _refuse_unexpected(checkpoint: Checkpoint, config: ModelConfig, known: list[Match]) -> None:
    placed = {part.name for match in known for part in (match.tensor, match.scales) if part is not None}
    names = [name for name in checkpoint.tensors if name not in placed and not _IGNORED.search(name)]
    if config.tie_embeddings:
        names = [name for name in names if name != "lm_head.weight"]
    if names:
        raise CheckpointError(
            f"{checkpoint.folder} holds tensors that a {config.family} model of this config.json has no place for: "
            f"{_some(names)}. The config.json belongs to another model, or the model has parts that are not supported."
        )


def _refuse_missing(checkpoint: Checkpoint, places: Mapping[str, Piece], known: list[Match]) -> None:
    units = _units(places)
    filled = {unit for match in known for unit in _filled(match.piece, units)}
    missing = [name for param in units.values() for unit, name in param.items() if unit not in filled]
    if missing:
        raise MissingTensorError(
            f"{checkpoint.folder} lacks {len(missing)} tensors that config.json asks for: {_some(missing)}."
        )


def _refuse_twice(known: list[Match], places: Mapping[str, Piece]) -> None:
    units = _units(places)
    first: dict[Unit, str] = {}
    for match in known:
        for unit in _filled(match.piece, units):
            if unit in first:
                raise CheckpointError(
                    f"{first[unit]} and {match.tensor.name} are two forms of the same weights; keep one of them."
                )
            first[unit] = match.tensor.name


def _refuse_shapes(known: list[Match], packing: Packing | None) -> None:
    wrong = [
        f"{tensor.name} is {list(tensor.shape)} instead of {list(shape)} (in {tensor.file.name})"
        for match in known
        for tensor, shape in _stored_shapes(match, packing)
        if tensor.shape != shape
    ]
    if wrong:
        raise TensorShapeError(f"the checkpoint's shapes differ from config.json's: {_some(wrong, '; ')}.")


def _stored_shapes(match: Match, packing: Packing | None) -> Iterator[tuple[StoredTensor, Shape]]:
    """What the file holds for a match, and the shape that each should have."""
    *rows, columns = match.piece.shape
    if packing is None or match.bits is None or match.scales is None:
        yield match.tensor, match.piece.shape
        return
    yield match.tensor, (*rows, code_columns(columns, match.bits))
    yield match.scales, (*rows, packing.scale_columns(columns))


def _refuse_dtypes(known: list[Match]) -> None:
    wrong = [
        f"{m.tensor.name} is {m.tensor.dtype}"
        for m in known
        if m.tensor.dtype not in (ITEM_SIZES if m.bits is None else (CODES[m.bits],))
    ]
    wrong += [f"{m.scales.name} is {m.scales.dtype}" for m in known if m.scales and m.scales.dtype != "BF16"]
    if wrong:
        raise CheckpointError(
            f"the checkpoint's number formats are not supported: {_some(wrong)}. Supported: {', '.join(ITEM_SIZES)}; "
            "use the unquantized model."
        )


# The smallest thing a checkpoint may store by itself: parameter, first row, expert.
Unit = tuple[str, int, int | None]


def _units(places: Mapping[str, Piece]) -> dict[str, dict[Unit, str]]:
    """Of each parameter, the units it is made of, each with its usual name in checkpoints."""
    units: dict[str, dict[Unit, str]] = {}
    for name, piece in places.items():
        if not piece.fused:
            units.setdefault(piece.param, {}).setdefault((piece.param, piece.start, piece.expert), name)
    return units


def _filled(piece: Piece, units: Mapping[str, Mapping[Unit, str]]) -> Iterable[Unit]:
    return units[piece.param] if piece.fused else [(piece.param, piece.start, piece.expert)]


def _some(names: list[str], separator: str = ", ") -> str:
    """Up to five names, and how many more there are."""
    rest = len(names) - _SHOWN
    return separator.join(names[:_SHOWN]) + (f"{separator}and {rest} more" if rest > 0 else "")


def _them(names: list[str]) -> str:
    return "it" if len(names) == 1 else "them"
