"""Which tile serves which launch: what was measured on this GPU, looked up by operation, shape, dtype and rows.

Enters: JSON files as `flexmoe tune` writes them, one that comes with the package for a kind of GPU, and the user's,
which goes first. Leaves: tiles, and limits: up to how many rows one way of computing beats another. Where nothing alike
was measured there is None, and the operation's own `default_tile` decides.

`rows` are the tokens T of a step. A tile serves the rows that it was measured for and those near: in the same regime,
less than twice as many or few, the nearest first. For the grouped expert operations near is what leaves an expert as
many rows: there the distance is that of tokens per active expert under uniform routing.
"""

from __future__ import annotations

import json
import logging
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from flexmoe.config.model import AttentionConfig, MoEConfig
from flexmoe.kernels.kept import cache_folder
from flexmoe.kernels.triton.decode_attention import DecodeAttentionTile
from flexmoe.kernels.triton.expert_down import DownGemvTile, DownTile
from flexmoe.kernels.triton.expert_gate_up import GateUpGemvTile, GateUpTile
from flexmoe.kernels.triton.norm_linear import DirectTile, DotTile, GemvTile
from flexmoe.kernels.triton.route import RouteTile

_log = logging.getLogger(__name__)

Entry = TypeVar("Entry")

_VERSION = 1  # of the files; another one when a tile's fields change their meaning
_SHIPPED = Path(__file__).parents[2] / "assets" / "tiles"

# The kinds of tile that each operation takes. A new kernel's operation gets a line here.
KINDS: Mapping[str, tuple[type, ...]] = {
    "norm_linear": (GemvTile, DirectTile, DotTile),
    "decode_attention": (DecodeAttentionTile,),
    "route": (RouteTile,),
    "expert_gate_up_gemv": (GateUpGemvTile,),
    "expert_down_gemv": (DownGemvTile,),
    "expert_gate_up_grouped": (GateUpTile,),
    "expert_down_grouped": (DownTile,),
}
# Up to how many rows: the gemv expert kernels serve a step; `topk_by_expert` replaces `topk` and `group_by_expert`.
LIMITS = ("expert_gemv", "topk_by_expert")

# Tiles of a projection hold a number of rows in registers: none is used where one more block of rows would begin.
_REGIMES = {"norm_linear": (8, 16, 32, 64, 128, 256)}
_NEAR = math.log(2)
_NEAR_GROUPED = math.log(1.9)  # the rows of most experts would be cut in two by a tile for half as many


@dataclass(frozen=True, slots=True)
class Work:
    """What a tile is for. shape: names and numbers, sorted. dtype: of the weights, as "bfloat16"."""

    op: str
    shape: tuple[tuple[str, int], ...]
    dtype: str

    @classmethod
    def of(cls, op: str, dtype: torch.dtype | str, **shape: int) -> Work:
        """The functions below say which names an operation's shape has."""
        return cls(op, tuple(sorted(shape.items())), str(dtype).removeprefix("torch."))

    def distance(self, rows: int, other: int) -> float:
        """How far apart two numbers of rows are; infinite across regimes."""
        bounds = _REGIMES.get(self.op, ())
        if bisect_left(bounds, rows) != bisect_left(bounds, other):
            return math.inf
        return abs(math.log(self._filled(rows) / self._filled(other)))

    def _filled(self, rows: int) -> float:
        """Rows that meet a weight: all, or for grouped experts those of an expert that gets any."""
        if not self.op.endswith("_grouped"):
            return rows
        shape = dict(self.shape)
        share = min(1.0, shape["top_k"] / shape["E"])
        return rows * share / (1 - (1 - share) ** rows)


def linear_work(dtype: torch.dtype, n: int, k: int, *, norm: bool) -> Work:
    """A projection by a weight [n, k], of rows that it norms or of others."""
    return Work.of("norm_linear", dtype, N=n, K=k, norm=int(norm))


def attention_work(dtype: torch.dtype, attention: AttentionConfig, *, long: bool) -> Work:
    """Decode attention over hundreds of keys, or, if `long`, thousands."""
    heads, kv_heads, head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    return Work.of("decode_attention", dtype, heads=heads, kv_heads=kv_heads, head_dim=head_dim, long=int(long))


def route_work(dtype: torch.dtype, hidden: int, moe: MoEConfig) -> Work:
    """Norm and router, whose weight is of `dtype`."""
    return Work.of("route", dtype, H=hidden, E=moe.num_experts)


def expert_work(op: str, dtype: torch.dtype, hidden: int, moe: MoEConfig) -> Work:
    """An operation on experts, or the limit "expert_gemv"."""
    return Work.of(op, dtype, H=hidden, F=moe.expert_width, E=moe.num_experts, top_k=moe.top_k)


def grouping_work(dtype: torch.dtype, moe: MoEConfig) -> Work:
    """The limit "topk_by_expert"; dtype: the model's, though the logits are fp32."""
    return Work.of("topk_by_expert", dtype, E=moe.num_experts, top_k=moe.top_k)


@dataclass(frozen=True, slots=True)
class Measured:
    """The best tile for `rows`; None: the operation's own choice.

    us: microseconds, with it, of a layer of a decode step (of a step of one layer, for the head); default_us: without.
    """

    work: Work
    rows: int
    tile: Any
    us: float
    default_us: float


@dataclass(frozen=True, slots=True)
class Limit:
    """Up to `rows`, 0 for never, a way of computing is the better one."""

    work: Work
    rows: int


class TileTable:
    """Measured tiles and limits; the later of two for the same work and rows counts."""

    def __init__(self, tiles: Iterable[Measured] = (), limits: Iterable[Limit] = ()) -> None:
        self._tiles: dict[Work, dict[int, Measured]] = {}
        for measured in tiles:
            self._tiles.setdefault(measured.work, {})[measured.rows] = measured
        self._limits = {limit.work: limit for limit in limits}

    def tile(self, work: Work, rows: int) -> Any:
        """The tile of the nearest measured rows, or None."""
        near = [(work.distance(rows, other), other) for other in self._tiles.get(work, ())]
        limit = _NEAR_GROUPED if work.op.endswith("_grouped") else _NEAR
        near = [(distance, other) for distance, other in near if distance < limit]
        return self._tiles[work][min(near)[1]].tile if near else None

    def limit(self, work: Work) -> int | None:
        """Up to how many rows, if that was measured."""
        found = self._limits.get(work)
        return None if found is None else found.rows

    def with_(self, other: TileTable) -> TileTable:
        """Both; where both measured the same, the other's."""
        return TileTable([*self.measured(), *other.measured()], [*self.limits(), *other.limits()])

    def measured(self) -> Iterator[Measured]:
        """All tiles, those of one work together."""
        for by_rows in self._tiles.values():
            yield from by_rows.values()

    def limits(self) -> Iterator[Limit]:
        """All limits."""
        yield from self._limits.values()

    def __len__(self) -> int:
        return sum(map(len, self._tiles.values())) + len(self._limits)


def tiles_for(device: torch.device) -> TileTable:
    """What the package and the user have measured on such a GPU; empty on a CPU."""
    if device.type != "cuda":
        return TileTable()
    return tiles_of(torch.cuda.get_device_name(device))


def tiles_of(gpu: str) -> TileTable:
    """What the package and the user have measured on the GPU that torch calls so."""
    own, shipped = user_file(gpu), read(shipped_file(gpu))
    return shipped if own is None else shipped.with_(read(own))


def shipped_file(gpu: str) -> Path:
    """The package's table for the GPU that torch calls so."""
    return _SHIPPED / f"{file_stem(gpu)}.json"


def user_file(gpu: str) -> Path | None:
    """The user's table for it, in the user's cache folder. None for a user without a home."""
    folder = cache_folder()
    return None if folder is None else folder / "tiles" / f"{file_stem(gpu)}.json"


def file_stem(gpu: str) -> str:
    """From "NVIDIA H100 80GB HBM3" to "nvidia-h100": how much memory it has does not matter to tiles."""
    words = re.findall(r"[a-z0-9]+", gpu.lower())
    return "-".join(word for word in words if not re.fullmatch(r"\d+gb|hbm\w*", word)) or "unknown"


def read(path: Path) -> TileTable:
    """The table in a file; empty if there is none, or, with one line in the log, if it cannot be understood.

    An entry that is not understood, as one of another version's kernels, is left out; one line says how many are.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, tiles, limits = content["version"], [*content["tiles"]], [*content["limits"]]
    except FileNotFoundError:
        return TileTable()
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is damaged and ignored; `flexmoe tune` writes it anew: %r", path, error)
        return TileTable()
    if version != _VERSION:
        _log.warning("%s is ignored: its version is %r, this one reads %d", path, version, _VERSION)
        return TileTable()
    strange: list[Exception] = []
    table = TileTable(_understood(tiles, _measured, strange), _understood(limits, _limit, strange))
    if strange:
        _log.warning("%s: %d entries are not understood and ignored; the first: %r", path, len(strange), strange[0])
    return table


def _understood(rows: Iterable[Any], read_one: Callable[[Any], Entry], strange: list[Exception]) -> list[Entry]:
    entries = []
    for row in rows:
        try:
            entries.append(read_one(row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            strange.append(error)
    return entries


def write(path: Path, table: TileTable, gpu: str) -> None:
    """Write the table, one entry a line, so that a reader of differences sees what changed. Errors: OSError."""
    tiles = sorted(table.measured(), key=lambda m: (m.work.op, m.work.dtype, m.work.shape, m.rows))
    limits = sorted(table.limits(), key=lambda limit: (limit.work.op, limit.work.dtype, limit.work.shape))
    parts = [
        f'"version": {_VERSION}',
        f'"gpu": {json.dumps(gpu)}',
        f'"tiles": [{_lines(_row(m) for m in tiles)}]',
        f'"limits": [{_lines(_named(limit.work) | {"rows": limit.rows} for limit in limits)}]',
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    beside.replace(path)


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    text = ",\n".join(json.dumps(row) for row in rows)
    return f"\n{text}\n" if text else ""


def _named(work: Work) -> dict[str, Any]:
    return {"op": work.op, "shape": dict(work.shape), "dtype": work.dtype}


def _row(measured: Measured) -> dict[str, Any]:
    row = _named(measured.work) | {"rows": measured.rows}
    if measured.tile is not None:
        row |= {"kind": type(measured.tile).__name__, "tile": asdict(measured.tile)}
    return row | {"us": round(measured.us, 3), "default_us": round(measured.default_us, 3)}


def _measured(row: Mapping[str, Any]) -> Measured:
    work, rows = _work(row, KINDS), _count(row["rows"], least=1)
    tile = _tile(work.op, row["kind"], row["tile"]) if "kind" in row else None
    return Measured(work, rows, tile, float(row["us"]), float(row["default_us"]))


def _limit(row: Mapping[str, Any]) -> Limit:
    return Limit(_work(row, LIMITS), _count(row["rows"], least=0))


def _work(row: Mapping[str, Any], ops: Iterable[str]) -> Work:
    if row["op"] not in ops:
        raise ValueError(f"no operation {row['op']!r}")
    return Work.of(row["op"], row["dtype"], **{name: _count(number, least=0) for name, number in row["shape"].items()})


def _tile(op: str, kind: str, values: Mapping[str, Any]) -> Any:
    made = next((known for known in KINDS[op] if known.__name__ == kind), None)
    if made is None:
        raise ValueError(f"{op} has no {kind}")
    types = {field.name: field.type for field in fields(made)}
    for name, value in values.items():
        if type(value).__name__ != types.get(name):
            raise ValueError(f"{kind}: {name}={value!r}")
    return made(**values)


def _count(value: Any, *, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{value!r} is no count")
    return value
